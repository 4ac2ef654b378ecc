"""What the model is asked, for a plan and for a patch.

Both prompts begin with the same text (surroundings, code, instruction), so that the KV cache of the PLAN serves the
PATCH. The layout (code before, instruction, code after) and the absence of a system prompt were chosen by measurement;
DECISIONS.md has the table. The user's code stands in fences longer than any run of backticks in it, and the tokenizer
encodes it as data, so nothing in it can end its place in the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from engine.inference.protocol import Message
from engine.patching.context import Context
from engine.patching.scopes import Scope

PROMPT_VERSION = "1"

_PLAN_QUESTION = "Say in one short sentence which lines must change, and how. No code block."


@dataclass(frozen=True, slots=True)
class Feedback:
    """Why an earlier patch was not good enough, from the user or from a gate.

    Args:
        reason: What was wrong.
        hint: What to do about it.
    """

    reason: str = ""
    hint: str = ""

    def to_json(self) -> dict[str, str]:
        """The feedback as the ledger keeps it."""
        return {"reason": self.reason, "hint": self.hint}


@dataclass(frozen=True, slots=True)
class Task:
    """What a prompt is about.

    Args:
        context: The function and its surroundings.
        intent: What the user wants.
        style: A sentence on code style, may be empty.
        feedback: On an earlier patch, if any.
    """

    context: Context
    intent: str
    style: str = ""
    feedback: Feedback | None = None


def fence_for(*texts: str) -> str:
    """A fence that none of `texts` can close: one backtick more than their longest run, at least three."""
    longest = max((len(run) for text in texts for run in re.findall(r"`+", text)), default=0)
    return "`" * max(3, longest + 1)


def fence_of(context: Context) -> str:
    """The fence of a context's prompt.

    Args:
        context: What the prompt shows.

    Returns:
        A run of backticks.
    """
    return fence_for(
        context.imports, context.class_header, context.signatures, context.before, context.function, context.after
    )


def describe(scope: Scope) -> str:
    """The scope in words for the model, such as ``function `add` ``.

    Args:
        scope: What is to be edited.

    Returns:
        Its kind and name.
    """
    return "file" if scope.kind == "module" else f"{scope.kind} `{scope.qualname}`"


def plan_messages(task: Task) -> list[Message]:
    """The chat that asks for a plan.

    Args:
        task: What to plan.

    Returns:
        One user turn.
    """
    return [Message("user", f"{_shown(task)}## Plan:\n{_PLAN_QUESTION}\n")]


def rewrite_messages(task: Task, plan_text: str) -> list[Message]:
    """The chat that asks for the whole new function.

    Args:
        task: What to change.
        plan_text: The plan's steps, may be empty.

    Returns:
        One user turn; the answer is meant to start inside a fence.
    """
    return [Message("user", f"{_shown(task)}{_plan(plan_text)}## Code After:\n")]


def json_messages(task: Task, plan_text: str, numbered: str) -> list[Message]:
    """The chat that asks for a JSON list of edits.

    Args:
        task: What to change.
        plan_text: The plan's steps, may be empty.
        numbered: The function's lines with their numbers.

    Returns:
        One user turn.
    """
    fence = fence_of(task.context)
    name = task.context.path.replace("\\", "/").rpartition("/")[2]
    return [
        Message(
            "user",
            f"{_shown(task)}{_plan(plan_text)}## Code Before, with line numbers:\n{fence}\n{numbered}{fence}\n"
            "## Edits:\n"
            "Write the change as a JSON list of edits: "
            f'[{{"path": "{name}", "action": "replace", "start_line": first line, "end_line": last line, '
            '"pre": "the lines that are replaced, exactly", "new": "the new lines, with their indentation"}]. '
            '"insert" puts new lines before start_line; "delete" removes lines. '
            "Change as few lines as the instruction needs.\n",
        )
    ]


def repair_turns(answer: str, gate: str, reason: str, *, wants_json: bool) -> list[Message]:
    """The turns that tell the model which gate refused its answer.

    Args:
        answer: What it wrote.
        gate: The gate's name.
        reason: Why it refused.
        wants_json: Whether edits in JSON are expected, or code.

    Returns:
        The model's turn and the user's answer to it.
    """
    if gate == "change":
        reason = "The code after is the same as the code before. The instruction is not done yet."
    ask = "Write the corrected JSON list of edits." if wants_json else "Write the corrected code after, complete."
    return [Message("assistant", answer), Message("user", f"This was refused by the check `{gate}`: {reason}\n{ask}\n")]


def _shown(task: Task) -> str:
    """The beginning that all prompts about one function share."""
    context, fence = task.context, fence_of(task.context)
    text = _surroundings(context, fence)
    text += f"## Code Before:\n{fence}python\n{context.function}{fence}\n## Instruction:\n{_one_block(task.intent)}\n"
    if task.style:
        text += f"{_one_block(task.style)}\n"
    if task.feedback is not None:
        parts = [part for part in (task.feedback.reason, task.feedback.hint) if part]
        text += "".join(f"{_one_block(part)}\n" for part in parts)
    return text


def _surroundings(context: Context, fence: str) -> str:
    above = _joined((context.imports, context.class_header, context.signatures, context.before))
    below = context.after
    if not above.strip() and not below.strip():
        return ""
    middle = f"{context.scope.indent}# ... the {describe(context.scope).replace('`', '')} ...\n"
    return f"## File `{context.path}` around it, not to be changed:\n{fence}python\n{above}{middle}{below}{fence}\n"


def _joined(parts: Sequence[str]) -> str:
    return "".join(part if part.endswith("\n") else f"{part}\n" for part in parts if part)


def _plan(plan_text: str) -> str:
    return f"## Plan:\n{_one_block(plan_text)}\n" if plan_text.strip() else ""


def _one_block(text: str) -> str:
    return text.strip("\r\n")
