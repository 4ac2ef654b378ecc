"""One edit, measured: a plan, a patch, what the model wrote for them, and why nothing was offered.

Times are wall clock, so they include the wait for an engine that serves several edits at once.
"""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from engine.errors import (
    BudgetError,
    CancelledError,
    EngineError,
    EnvironmentFault,
    GateError,
    PlanPatchError,
    RefusedError,
    SourceError,
    UnknownScopeError,
)
from engine.inference.cancellable import CancellableEngine
from engine.inference.protocol import (
    Completion,
    Engine,
    Event,
    FinishReason,
    GenerationRequest,
)
from engine.patching.edits import SchemaFault, edits_from_json
from engine.patching.ledger import Ledger
from engine.patching.patcher import Patch, Patcher, PatcherOptions, Plan
from engine.patching.scopes import Scope
from engine.patching.source import Source
from lsp_server import console


@dataclass(frozen=True, slots=True)
class Generation:
    """One request and its completion."""

    request: GenerationRequest
    completion: Completion

    @property
    def is_bad_json(self) -> bool:
        """Whether a whole answer was to be JSON and does not parse or fit the schema of edits.

        JSON is all that PlanPatch constrains by a grammar.
        """
        wants_json = self.request.params.grammar is not None
        if not wants_json or self.completion.finish_reason is not FinishReason.STOP:
            return False
        try:
            edits_from_json(json.loads(self.completion.text))
        except (ValueError, SchemaFault):
            return True
        return False


class MeteredEngine(CancellableEngine):
    """An engine for one edit that keeps what was generated."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self.generations: list[Generation] = []

    def stream(self, request_id: str) -> Iterator[Event]:
        """Yield the engine's events, and keep the completion.

        Args:
            request_id: What `submit` returned.

        Yields:
            The events.

        Raises:
            EngineError: The id is unknown, or the engine failed.
        """
        with closing(cast("Generator[Event]", super().stream(request_id))) as events:
            for event in events:
                if isinstance(event, Completion):
                    self.generations.append(Generation(self._requests[request_id], event))
                yield event


@dataclass(slots=True)
class Outcome:
    """What became of one edit.

    Args:
        plan: The plan, if one was made.
        patch: The patch, if one was offered.
        error: Why none was.
        reason: The same in a word or a line; None if a patch was offered.
        plan_ms: Wall clock of PLAN in milliseconds.
        patch_ms: Wall clock of PATCH, its repair included.
        num_plan_generations: How many of the generations were for the plan; None if PATCH never began.
        generations: Everything that was generated, in order.
    """

    plan: Plan | None = None
    patch: Patch | None = None
    error: PlanPatchError | None = None
    reason: str | None = None
    plan_ms: float = 0.0
    patch_ms: float = 0.0
    num_plan_generations: int | None = None
    generations: Sequence[Generation] = field(default_factory=list[Generation])

    @property
    def ok(self) -> bool:
        """Whether a patch was offered."""
        return self.reason is None

    @property
    def total_ms(self) -> float:
        """Wall clock of both."""
        return self.plan_ms + self.patch_ms

    @property
    def num_tokens(self) -> int:
        """Generated tokens, those of refused attempts included."""
        return sum(len(generation.completion.token_ids) for generation in self.generations)

    @property
    def num_bad_json(self) -> int:
        """Whole answers that were to be JSON and are not."""
        return sum(generation.is_bad_json for generation in self.generations)

    @property
    def answers(self) -> list[str]:
        """What the model wrote for the patch, attempt by attempt."""
        first = len(self.generations) if self.num_plan_generations is None else self.num_plan_generations
        return [generation.completion.text for generation in self.generations[first:]]

    def details(self) -> dict[str, Any]:
        """What a table of results may need besides the result itself."""
        gates: Sequence[Any] = self.error.details.get("gates", ()) if self.error else ()
        completions = [generation.completion for generation in self.generations]
        return {
            "plan": self.plan.text if self.plan else None,
            "plan_truncated": self.plan.truncated if self.plan else None,
            "gates": list(self.patch.gates if self.patch else gates),
            "repairs": list(self.patch.repairs) if self.patch else [],
            "second_choice": self.patch.is_second_choice if self.patch else False,
            "edits": [edit.to_json() for edit in self.patch.edits] if self.patch else [],
            "imports": list(self.patch.imports) if self.patch else [],
            "num_attempts": len(self.answers),
            "answers": self.answers,
            "num_bad_json": self.num_bad_json,
            "num_prompt_tokens": sum(completion.num_prompt_tokens for completion in completions),
            "num_cached_tokens": sum(completion.num_cached_tokens for completion in completions),
            "queue_s": round(sum(completion.queue_s for completion in completions), 4),
            "prefill_s": round(sum(completion.prefill_s for completion in completions), 4),
            "decode_s": round(sum(completion.decode_s for completion in completions), 4),
            "error": self.error.message if self.error else None,
        }


def measure_edit(
    engine: MeteredEngine,
    options: PatcherOptions,
    source: Source,
    scope: Scope,
    intent: str,
    *,
    with_plan: bool,
    ledger: Ledger | None = None,
) -> Outcome:
    """Plan and patch once, never from the ledger.

    A fault inside PlanPatch is printed and becomes the outcome `crash:…`: it must not end a run of hours.

    Args:
        engine: The engine for this edit alone.
        options: Budgets and format.
        source: The file.
        scope: What to change.
        intent: What is wanted.
        with_plan: Whether to plan first.
        ledger: Where the proposal is kept; None keeps none.

    Returns:
        What became of it.

    Raises:
        CancelledError: The edit was cancelled.
        EnvironmentFault: The engine failed for good, or the ledger did.
    """
    patcher = Patcher(engine, ledger, options)
    outcome = Outcome(generations=engine.generations)
    try:
        if with_plan:
            with _timed(outcome, "plan_ms"):
                outcome.plan = patcher.plan(source, scope, intent)
        outcome.num_plan_generations = len(engine.generations)
        with _timed(outcome, "patch_ms"):
            outcome.patch = patcher.patch(source, scope, intent, plan=outcome.plan, fresh=True)
        outcome.reason = None if outcome.patch.edits else "edits=[]"
    except PlanPatchError as error:
        _check_goes_on(engine, error)
        outcome.error, outcome.reason = error, reason_of(error)
    except Exception as fault:
        console.err.print(traceback.format_exc(), markup=False)
        outcome.reason = f"crash:{type(fault).__name__}: {fault}"
    return outcome


@contextmanager
def _timed(outcome: Outcome, name: Literal["plan_ms", "patch_ms"]) -> Generator[None]:
    started_at = time.monotonic()
    try:
        yield
    finally:
        setattr(outcome, name, round((time.monotonic() - started_at) * 1000, 1))


def _check_goes_on(engine: Engine, error: PlanPatchError) -> None:
    """Raise `error` if it is not about this one edit."""
    is_about_one_edit = isinstance(error, EngineError) and engine.status().state == "ready"
    if isinstance(error, CancelledError) or (isinstance(error, EnvironmentFault) and not is_about_one_edit):
        raise error


def reason_of(error: PlanPatchError) -> str:
    """An error as the results name it: `gate:change`, `budget:tokens`, `context_length`, `scope:…`, `source:…`.

    Args:
        error: Why no patch is offered.

    Returns:
        The kind, and what tells it from others of its kind.
    """
    if isinstance(error, GateError):
        return f"gate:{error.details.get('gate', 'unknown')}"
    if isinstance(error, BudgetError):
        return f"budget:{error.details.get('budget', 'unknown')}"
    if isinstance(error, UnknownScopeError):
        return f"scope:{error.message}"
    if isinstance(error, SourceError):
        return f"source:{error.message}"
    if isinstance(error, RefusedError):
        return error.code
    return f"{error.code}:{error.message}"


def reason_group(reason: str) -> str:
    """A reason without what is particular to one case, for counting.

    Args:
        reason: As `reason_of` gives it.

    Returns:
        `gate:change` and `budget:tokens` whole; of others the kind.
    """
    kind = reason.partition(":")[0]
    return reason if kind in ("gate", "budget") else kind


def without_time_limits(options: PatcherOptions) -> PatcherOptions:
    """The same options with token budgets only, so that a result does not depend on the machine's speed.

    Args:
        options: Any options.

    Returns:
        Them, without wall-clock limits.
    """
    return replace(options, plan=replace(options.plan, max_time_s=None), patch=replace(options.patch, max_time_s=None))


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value that at least `share` of `values` do not exceed (nearest rank).

    Args:
        values: Any numbers.
        share: 0.5 for the median, 0.95 for p95.

    Returns:
        One of `values`; None if there are none.
    """
    ranked = sorted(values)
    return ranked[max(0, math.ceil(share * len(ranked)) - 1)] if ranked else None
