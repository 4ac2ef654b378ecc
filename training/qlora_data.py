"""From the lines of a data set to rows of token ids.

An example is the prompt of PATCH exactly as the model is asked it, and the answer; the loss is on the answer alone. A
row holds several examples one after another. They do not see each other: each counts its positions from 0, from which
transformers makes a block-diagonal attention mask (`find_packed_sequence_indices` in its `masking_utils`).

Not covered: attention implementations that ignore positions; `check_rows_are_apart` refuses to train with one.
"""

from __future__ import annotations

import bisect
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from engine.errors import EngineError, PathError, UsageError
from engine.inference.protocol import Message
from engine.inference.tokenizer import HFChatTokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn

IGNORED = -100  # what cross entropy leaves out


@dataclass(frozen=True, slots=True)
class Example:
    """One example as token ids.

    Args:
        token_ids: Prompt and answer.
        num_prompt: How many of them are the prompt.
    """

    token_ids: tuple[int, ...]
    num_prompt: int

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(slots=True)
class Examples:
    """The examples of a file.

    Args:
        usable: Those that fit a row.
        ids: Their ids; empty for those that have none.
        too_long: Ids of those that do not.
        num_lines: Lines of the file.
        sha256: Of the file.
    """

    usable: list[Example] = field(default_factory=list[Example])
    ids: list[str] = field(default_factory=list[str])
    too_long: list[str] = field(default_factory=list[str])
    num_lines: int = 0
    sha256: str = ""

    def to_json(self) -> dict[str, Any]:
        """Counts and digest; no text and no path."""
        return {
            "sha256": self.sha256,
            "lines": self.num_lines,
            "used": len(self.usable),
            "too_long": len(self.too_long),
            "tokens": sum(map(len, self.usable)),
            "answer_tokens": sum(len(one) - one.num_prompt for one in self.usable),
        }


Row = tuple[Example, ...]


def read_examples(path: Path, tokenizer: HFChatTokenizer, row_tokens: int) -> Examples:
    """Read a data set as `planpatch train dataset` writes it.

    Args:
        path: JSON lines with `input` and `output`, and perhaps `instruction`, `prefill` and `id`, all text.
        tokenizer: The base's.
        row_tokens: Longer examples are left out.

    Returns:
        The examples.

    Raises:
        PathError: The file cannot be read.
        UsageError: A line is no such object; names the line.
        ModelError: The model cannot be asked this way.
    """
    try:
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")  # not splitlines: texts may hold other line separators
    except OSError as fault:
        raise PathError(
            f"The data set {path} cannot be read: {fault.strerror or fault}",
            hint="planpatch train dataset makes it; --data names another.",
        ) from fault
    except UnicodeDecodeError as fault:
        raise UsageError(f"{path} is not UTF-8: {fault}", hint=f"planpatch train sanitize {path}") from fault
    found = Examples(sha256=hashlib.sha256(data).hexdigest())
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.num_lines += 1
        fields = _fields(line, path, number)
        example = _encoded(fields, tokenizer, path, number)
        if len(example) > row_tokens:
            found.too_long.append(fields.get("id") or f"line {number}")
        else:
            found.usable.append(example)
            found.ids.append(fields["id"])
    return found


def _fields(line: str, path: Path, number: int) -> dict[str, str]:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise _bad_line(path, number, f"is not JSON: {fault}") from fault
    if not isinstance(value, dict):
        raise _bad_line(path, number, "is no JSON object")
    values = cast("dict[str, Any]", value)
    fields = {name: values.get(name, "") for name in ("instruction", "input", "output", "prefill", "id")}
    for name, text in fields.items():
        if not isinstance(text, str):
            raise _bad_line(path, number, f"has a field {name} that is no text")
    for name in ("input", "output"):
        if name not in values:
            raise _bad_line(path, number, f"has no field {name}")
    return cast("dict[str, str]", fields)


def _bad_line(path: Path, number: int, what: str) -> UsageError:
    return UsageError(f"Line {number} of {path} {what}", hint=f"planpatch train sanitize {path} mends it.", line=number)


def _encoded(fields: dict[str, str], tokenizer: HFChatTokenizer, path: Path, number: int) -> Example:
    """The prompt's ids as `encode_chat` gives them to the engine, then the answer's, then the end of the answer."""
    prefill, output = fields["prefill"], fields["output"]
    if not output.startswith(prefill):
        raise _bad_line(path, number, "has an output that does not begin with its prefill")
    question = "\n\n".join(text for text in (fields["instruction"], fields["input"]) if text)
    prompt = tokenizer.encode_chat([Message("user", question)], prefill=prefill)
    answer = tokenizer.encode(output[len(prefill) :])
    if not answer:
        raise _bad_line(path, number, "has an empty answer")
    return Example((*prompt, *answer, tokenizer.end_of_answer_id), len(prompt))


# --- rows ------------------------------------------------------------------------------------------------------------


def pack(examples: Sequence[Example], row_tokens: int, *, packing: bool = True) -> list[Row]:
    """Put examples into rows, the longest first, each into the fullest row that has room (best-fit decreasing).

    The same examples give the same rows.

    Args:
        examples: What to pack.
        row_tokens: Most tokens of a row.
        packing: Whether a row may hold more than one.

    Returns:
        The rows, in the order of their first examples.
    """
    if not packing:
        return [(example,) for example in examples]
    order = sorted(range(len(examples)), key=lambda number: (-len(examples[number]), number))
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for number in order:
        size = len(examples[number])
        place = bisect.bisect_left(room, (size, -1))
        if place < len(room):
            left, row = room.pop(place)
            rows[row].append(number)
        else:
            left, row = row_tokens, len(rows)
            rows.append([number])
        bisect.insort(room, (left - size, row))
    for row in rows:
        row.sort()
    return [tuple(examples[number] for number in row) for row in sorted(rows)]


def collate(rows: Sequence[Row], pad_to: int | None = None) -> dict[str, torch.Tensor]:
    """Rows as tensors. What fills a row up is one more block that nothing else sees and that has no loss.

    Args:
        rows: The rows.
        pad_to: Tokens of each; the longest row's when left out.

    Returns:
        `input_ids`, `labels` and `position_ids`, int64, rows × tokens.
    """
    import torch

    width = pad_to or max(sum(map(len, row)) for row in rows)
    filled = [_filled(row, width) for row in rows]
    names = ("input_ids", "labels", "position_ids")
    return {name: torch.tensor([row[number] for row in filled]) for number, name in enumerate(names)}


def _filled(row: Row, width: int) -> tuple[list[int], list[int], list[int]]:
    token_ids: list[int] = []
    labels: list[int] = []
    positions: list[int] = []
    for example in row:
        token_ids += example.token_ids
        labels += [*[IGNORED] * example.num_prompt, *example.token_ids[example.num_prompt :]]
        positions += range(len(example))
    num_fill = width - len(token_ids)
    return [*token_ids, *[0] * num_fill], [*labels, *[IGNORED] * num_fill], [*positions, *range(num_fill)]


def batches(rows: Sequence[Row], rows_at_once: int) -> Iterator[dict[str, torch.Tensor]]:
    """Rows in order, several at once.

    Args:
        rows: The rows.
        rows_at_once: How many.

    Yields:
        As `collate` gives them.
    """
    for start in range(0, len(rows), rows_at_once):
        yield collate(rows[start : start + rows_at_once])


def check_rows_are_apart(model: nn.Module, vocab_size: int) -> None:
    """Change the first example of a row and look whether the second one's outputs stay what they were, to the bit.

    Args:
        model: The base, in eval mode.
        vocab_size: Ids below it are tried.

    Raises:
        EngineError: They changed: the examples see each other.
    """
    import torch

    device = next(model.parameters()).device
    span = range(3, min(vocab_size, 40) - 20)
    first, other, second = (tuple((start + step) % vocab_size for step in span[:12]) for start in (3, 17, 5))
    with torch.no_grad():
        outputs: list[torch.Tensor] = []
        for beginning in (first, other):
            inputs = collate([(Example(beginning, 1), Example(second, 1))])
            found = model(
                input_ids=inputs["input_ids"].to(device),
                position_ids=inputs["position_ids"].to(device),
                use_cache=False,
                logits_to_keep=len(second),
            )
            outputs.append(found.logits)
    if not torch.equal(*outputs):
        raise EngineError(
            "This model's attention lets the examples of a packed row see each other",
            hint='Set "packing" to false, or use the version of transformers that constraints.txt names.',
        )
