"""Which actions are offered where."""

from __future__ import annotations

from typing import Any

import pytest

from lsp_server.code_actions import ActionState, Offer, Request, actions, function_at
from lsp_server.documents import Document, Position
from lsp_server.setting_values import DEFAULT_PRESETS

TEXT = """import os

@decorated(
    1
)
async def outer(a):
    # note
    def inner(b):

        return b

    return inner


class Box:
\tx = 1

\t@property
\tdef area(self):
\t\treturn 1


after = 1
"""
OFFER = Offer("p_1", "outer", 2, 11, "do it")
REFUSAL = Offer("p_2", "outer", 2, 11, "do it", "names", "`x` is undefined", {"intent": "do it", "fresh": True})


def menu(line: int, state: ActionState | None = None, **request: Any) -> list[str]:
    document = Document("file:///a.py", TEXT, 1)
    place = Position(line, 0)
    asked = Request(place, request.pop("end", place), **request)
    return [f"{action.kind} {action.title}" for action in actions(document, asked, state or ActionState())]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        (0, ""),
        (5, "outer"),
        (6, "outer"),
        (7, "outer.inner"),
        (8, "outer.inner"),
        (9, "outer.inner"),
        (11, "outer"),
        (14, "Box"),
        (15, "Box"),
        (17, "Box.area"),
        (19, "Box.area"),
        (12, ""),
        (13, ""),
        (20, ""),
        (22, ""),
        (99, ""),
    ],
)
def test_the_function_around_a_line_is_found_by_indentation(line: int, name: str) -> None:
    assert function_at(Document("file:///a.py", TEXT, 1), line) == name


def test_at_a_function_planning_and_every_preset_are_offered() -> None:
    assert menu(9, ActionState(presets=DEFAULT_PRESETS)) == [
        "refactor.rewrite.planpatch.plan PlanPatch: plan a change to `outer.inner`",
        "refactor.rewrite.planpatch.patch PlanPatch: add or mend the docstring",
        "refactor.rewrite.planpatch.patch PlanPatch: add type hints",
        "refactor.rewrite.planpatch.patch PlanPatch: handle errors",
        "refactor.rewrite.planpatch.patch PlanPatch: simplify",
    ]
    assert menu(0) == ["refactor.rewrite.planpatch.plan PlanPatch: plan a change to this file"]


def test_while_the_model_loads_titles_say_so() -> None:
    (title,) = menu(9, ActionState(is_loading=True))
    assert title.endswith("`outer.inner` (the model is still loading)")


def test_an_editor_that_asks_by_itself_gets_nothing_without_a_reason() -> None:
    state = ActionState(presets=DEFAULT_PRESETS, jobs={"j1": "patch for outer"}, applied=("p_0", "earlier"))
    assert menu(9, state, is_automatic=True) == []
    assert menu(9, state, is_automatic=True, end=Position(9, 4)) != []
    assert menu(9, state, is_automatic=True, diagnostics=[{"message": "x", "source": "linter"}]) != []
    assert menu(9, state, is_automatic=True, diagnostics=[{"message": "x", "source": "planpatch"}]) == []
    assert menu(9, ActionState(pending=[OFFER]), is_automatic=True) != []
    assert menu(20, ActionState(pending=[OFFER]), is_automatic=True) == []


@pytest.mark.parametrize(
    ("only", "count"),
    [
        (None, 8),
        ([], 8),
        ([""], 8),
        (["refactor"], 6),
        (["refactor.rewrite"], 6),
        (["refactor.rewrite.planpatch.plan"], 2),
        (["refactor.rewrite.planpatch.patch"], 4),
        (["quickfix"], 2),
        (["refactor.rew"], 0),
        (["source"], 0),
        (["source", "quickfix"], 2),
    ],
)
def test_prefixes_of_kinds_are_honoured(only: list[str] | None, count: int) -> None:
    state = ActionState(
        pending=[OFFER],
        refused=[REFUSAL],
        jobs={"j1": "patch for outer"},
        applied=("p_0", ""),
        rolled_back=("p_9", "x"),
    )
    found = menu(9, state, only=only, diagnostics=[{"message": "unused", "range": {}}])
    assert len(found) == count


def test_a_pending_patch_a_refusal_and_history_are_offered_where_they_belong() -> None:
    state = ActionState(pending=[OFFER], refused=[REFUSAL], applied=("p_0", "earlier"), rolled_back=("p_9", ""))
    assert menu(3, state)[:3] == [
        "refactor.rewrite.planpatch.patch PlanPatch: Apply: do it",
        "refactor.rewrite.planpatch.patch PlanPatch: Reject: do it",
        "quickfix PlanPatch: retry with this error: `x` is undefined",
    ]
    assert menu(20, state)[-2:] == [
        "refactor.rewrite.planpatch.patch PlanPatch: roll back: earlier",
        "refactor.rewrite.planpatch.patch PlanPatch: redo: p_9",
    ]


def test_a_plan_is_offered_on_its_own_function() -> None:
    state = ActionState(plans={"outer.inner": "make it\nfast"})
    assert "refactor.rewrite.planpatch.plan PlanPatch: patch from plan: make it fast" in menu(9, state)
    assert len(menu(11, state)) == 1


def test_long_texts_are_cut_in_titles() -> None:
    (title,) = [
        one for one in menu(3, ActionState(pending=[Offer("p", "outer", 2, 11, "word " * 50)])) if "Apply" in one
    ]
    assert title.endswith("…")
    assert len(title) < 120
