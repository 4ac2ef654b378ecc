"""What the user's later doings say about a patch: the workbench with a scripted model and a clock of the test's own."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.patching.ledger import Forgettable, Ledger, State
from lsp_server.editor import BufferEdit, ClientProfile
from lsp_server.paths import Paths
from lsp_server.settings import Settings
from lsp_server.uris import uri_of
from lsp_server.workbench import Workbench
from tests.fake_editor import PROFILE, FakeEditor, ReadyModel
from tests.scripted_engine import Answer, Reply, ScriptedEngine

TEXT = "import os\n\n\ndef f(a):\n    # one\n    return a - 1\n\n\ndef g():\n    return 2\n"
ANSWER = "def f(a):\n    # one\n    return a + 1\n"
PATCHED = TEXT.replace("a - 1", "a + 1")


class Desk:
    """A user at work, with a patch applied to `f`."""

    def __init__(
        self, folder: Path, answer: Answer = ANSWER, profile: ClientProfile = PROFILE, **settings: Any
    ) -> None:
        self.path = folder / "a.py"
        self.path.write_text(TEXT)
        self.uri = uri_of(self.path)
        self.now = 1000.0
        self.engine = ScriptedEngine(lambda prompt: answer)
        self.model = ReadyModel(self.engine)
        self.editor = FakeEditor(profile)
        paths = Paths(folder, folder / "none.toml")
        held = Settings(**{"apply": "direct", **settings})
        self.bench = Workbench(
            self.editor,
            self.model,
            lambda: Ledger(paths.ledger),
            paths,
            lambda path: held,
            clock=lambda: self.now,
            check_s=0.05,
        )
        self.editor.bench = self.bench
        self.buffer = self.editor.open(self.uri, TEXT)

    async def rest(self) -> None:
        for _ in range(1000):
            await asyncio.sleep(0.002)
            if not self.bench.jobs.running() and not self.bench._tasks:
                return
        raise AssertionError("it does not come to rest")

    async def patch(self, **argument: Any) -> str:
        job = await self.bench.patch({"uri": self.uri, "function": "f", "intent": "plus", **argument})
        await self.rest()
        self.job = job
        return str(job.result.get("patchId", ""))

    def type(self, text: str) -> None:
        self.buffer.change(text)
        self.editor.deliver(self.uri)

    async def save(self, *, is_manual: bool | None = True) -> None:
        file = self.bench.files[self.uri]
        if is_manual is not None:
            self.bench.labels.will_save(file, is_manual=is_manual)
        self.bench.labels.did_save(file)
        await self.rest()

    async def entry(self, patch_id: str) -> Any:
        await self.rest()
        return await self.bench.records.get(patch_id)


def at_desk(tmp_path: Path, story: Callable[[Desk], Awaitable[None]], **arguments: Any) -> Desk:
    async def run() -> Desk:
        desk = Desk(tmp_path, **arguments)
        await story(desk)
        await desk.bench.close()
        return desk

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("seconds", "is_manual", "label"),
    [(59, True, "unreviewed"), (61, True, "accepted"), (61, False, "unreviewed"), (61, None, "unreviewed")],
)
def test_a_save_by_hand_after_a_minute_accepts(
    seconds: float, is_manual: bool | None, label: str, tmp_path: Path
) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        assert desk.buffer.text == PATCHED
        desk.now += seconds
        await desk.save(is_manual=is_manual)
        assert (await desk.entry(patch_id)).label.value == label

    at_desk(tmp_path, story)


def test_a_client_that_gives_no_reason_saves_by_hand(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        desk.now += 61
        await desk.save(is_manual=None)
        assert (await desk.entry(patch_id)).label.value == "accepted"

    at_desk(tmp_path, story, profile=ClientProfile("old", has_versioned_edits=True))


def test_ten_minutes_accept_and_a_formatter_changes_nothing(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        desk.type(PATCHED.replace("    return a + 1", "    return (\n        a+1\n    )  # formatted"))
        desk.now += 599
        await desk.bench.labels.tick()
        assert (await desk.entry(patch_id)).label.value == "unreviewed"
        desk.now += 2
        await desk.bench.labels.tick()
        entry = await desk.entry(patch_id)
        assert entry.label.value == "accepted"
        assert entry.final_text is None

    at_desk(tmp_path, story)


def test_a_verdict_takes_what_the_editor_has(tmp_path: Path) -> None:
    """The user's own text was lost where they said that the patch is good before ten minutes were over."""

    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        desk.type(PATCHED.replace("a + 1", "a + 2"))
        await desk.bench.feedback(patch_id, True, "nearly")
        entry = await desk.entry(patch_id)
        assert (entry.label.value, entry.final_text) == ("accepted", desk.buffer.text.encode())
        desk.type(PATCHED.replace("a + 1", "(a + 1)"))
        other = await desk.patch()
        await desk.bench.feedback(other, True)
        assert (await desk.entry(other)).final_text is None

    at_desk(tmp_path, story)


def test_what_the_user_changed_is_accepted_with_the_final_text(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        desk.type(PATCHED.replace("a + 1", "a + 2"))
        desk.now += 601
        await desk.bench.labels.tick()
        entry = await desk.entry(patch_id)
        assert entry.label.value == "accepted"
        assert entry.final_text == desk.buffer.text.encode()
        assert entry.events[-1].data["reason"] == "kept for 10 minutes, changed by the user"

    at_desk(tmp_path, story)


def test_undo_is_a_reject_also_after_edits_elsewhere_and_after_an_accept(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        desk.now += 601
        await desk.bench.labels.tick()
        assert (await desk.entry(patch_id)).label.value == "accepted"
        desk.type("# elsewhere\n" + TEXT)
        entry = await desk.entry(patch_id)
        assert (entry.label.value, entry.standing.is_applied) == ("rejected", False)
        desk.type("# elsewhere\n" + PATCHED)
        entry = await desk.entry(patch_id)
        assert (entry.label.value, entry.standing.is_applied) == ("unreviewed", True)

    at_desk(tmp_path, story)


SHORTER = "def f(a):\n    # one\n    return a - 1\n    return a\n\n\ndef g():\n    return 2\n"


@pytest.mark.parametrize(
    ("text", "answer", "function", "then"),
    [
        (SHORTER, "def f(a):\n    # one\n    return a - 1\n", "f", ("    return a\n", "    return -a\n")),
        (SHORTER, "def f(a):\n    # one\n    return a - 1\n", "f", ("return 2", "return 3")),
        ("import os\n\nx = 1\n\n" + SHORTER, SHORTER, "", ("x = 1", "x = 2")),
        ("@cached\n" + SHORTER, SHORTER[:48], "f", ("@cached", "@other")),
    ],
)
def test_a_patch_that_deletes_and_was_rolled_back_is_not_redone_by_an_edit(
    text: str, answer: str, function: str, then: tuple[str, str], tmp_path: Path
) -> None:
    """What it leaves is a part of what was there before; the ledger said that it was applied again."""

    async def story(desk: Desk) -> None:
        desk.type(text)
        target = {"function": function} if function else {"position": {"line": 1, "character": 0}}
        job = await desk.bench.patch({"uri": desk.uri, "intent": "less", **target})
        await desk.rest()
        patch_id = str(job.result["patchId"])
        assert (await desk.entry(patch_id)).standing.is_applied
        assert len(desk.buffer.text) < len(text)
        await desk.bench.applier.turn("rollback", patch_id, None)
        assert desk.buffer.text == text
        desk.type(text.replace(*then))
        assert not (await desk.entry(patch_id)).standing.is_applied

    at_desk(tmp_path, story, answer=answer)


def test_a_patch_that_adds_is_not_undone_by_an_edit_of_what_it_added(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        assert "    return a - 1\n    return 0\n" in desk.buffer.text
        desk.type(desk.buffer.text.replace("return 0", "return 1"))
        entry = await desk.entry(patch_id)
        assert (entry.standing.is_applied, entry.label.value) == (True, "unreviewed")
        desk.type("# elsewhere\n" + TEXT)
        assert not (await desk.entry(patch_id)).standing.is_applied

    at_desk(tmp_path, story, answer=ANSWER.replace("return a + 1\n", "return a - 1\n    return 0\n"))


def test_a_patch_that_waits_for_review_blocks_the_label(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        desk.editor.on_apply = lambda edit: False
        desk.engine._script = lambda prompt: "def g():\n    return 3\n"
        await desk.bench.patch({"uri": desk.uri, "function": "g", "intent": "three"})
        await desk.rest()
        desk.now += 601
        await desk.bench.labels.tick()
        assert (await desk.entry(patch_id)).label.value == "unreviewed"
        (waiting,) = desk.bench.files[desk.uri].pending
        await desk.bench.reject(waiting)
        await desk.bench.labels.tick()
        assert (await desk.entry(patch_id)).label.value == "accepted"

    at_desk(tmp_path, story)


def test_a_patch_that_was_applied_while_the_file_was_recalled_does_not_wait(tmp_path: Path) -> None:
    """The list of what waits was older than the apply, and the patch was offered again, for good."""

    async def story(desk: Desk) -> None:
        read = desk.bench.records.get
        is_read, is_applied = asyncio.Event(), asyncio.Event()

        async def read_and_dawdle(patch_id: str) -> Any:
            nonlocal num_reads
            entry = await read(patch_id)
            num_reads += asyncio.current_task() is recall
            if asyncio.current_task() is recall and num_reads == 2:  # the first one is about labels
                is_read.set()
                await wait(is_applied)
            return entry

        async def recall_then_apply(edit: BufferEdit) -> bool:
            nonlocal recall
            recall = asyncio.ensure_future(desk.bench._recall(desk.bench.files[desk.uri]))
            await wait(is_read)
            return desk.editor.apply_honestly(edit)

        async def wait(event: asyncio.Event) -> None:
            with suppress(asyncio.TimeoutError):  # the recall may have to wait for the apply
                await asyncio.wait_for(event.wait(), 0.3)

        recall: asyncio.Future[None] | None = None
        num_reads = 0
        desk.bench.records.get = read_and_dawdle  # type: ignore[method-assign]
        desk.editor.on_apply = recall_then_apply
        await desk.patch()
        is_applied.set()
        assert recall is not None
        await recall
        assert desk.buffer.text == PATCHED
        assert not desk.bench.files[desk.uri].pending

    at_desk(tmp_path, story)


def test_an_explicit_verdict_is_stronger(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        await desk.bench.feedback(patch_id, accepted=False, reason="ugly")
        desk.now += 601
        await desk.bench.labels.tick()
        assert (await desk.entry(patch_id)).label.value == "rejected"

    at_desk(tmp_path, story)


def test_undo_of_a_roll_back_puts_the_patch_in_again_and_redo_knows_what_is_there(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        await desk.bench.applier.turn("rollback", patch_id, None)
        assert desk.buffer.text == TEXT
        desk.type(PATCHED)
        entry = await desk.entry(patch_id)
        assert (entry.state.value, entry.standing.is_applied) == ("applied", True)
        await desk.bench.applier.turn("rollback", patch_id, None)
        assert desk.buffer.text == TEXT
        desk.editor.on_apply = lambda edit: pytest.fail("nothing is to be sent")
        desk.bench.did_close(desk.uri)
        desk.buffer.change(PATCHED)
        desk.editor.reopen(desk.uri)
        await desk.rest()
        assert (await desk.entry(patch_id)).standing.is_applied

    at_desk(tmp_path, story)


def test_another_patch_with_the_same_result_does_not_revive_one_that_was_undone(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        first = await desk.patch()
        desk.type(TEXT)
        assert (await desk.entry(first)).label.value == "rejected"
        second = await desk.patch(intent="in other words")
        assert desk.buffer.text == PATCHED
        assert (await desk.entry(first)).label.value == "rejected"
        await desk.bench.applier.turn("rollback", second, None)
        desk.buffer.undo_once()
        desk.editor.deliver(desk.uri)
        entries = [await desk.entry(patch_id) for patch_id in (first, second)]
        assert [entry.standing.is_applied for entry in entries] == [False, True]

    at_desk(tmp_path, story)


# --- applying ---------------------------------------------------------------------------------------------------------


def test_a_second_choice_is_never_applied_unseen(tmp_path: Path) -> None:
    unchanged = "def f(a):\n    # one\n    return a - 1\n"
    fork = unchanged.index("-")
    replies = {"": Reply(unchanged, second_choices=((fork, "+", -1.0),))}

    def script(prompt: str) -> Answer:
        return "+ 1\n".removeprefix("+") if prompt.endswith("return a +") else replies[""]

    async def story(desk: Desk) -> None:
        desk.engine._script = script
        asked: list[str] = []
        desk.editor.on_ask = lambda message, choices: asked.append(message)
        await desk.patch()
        assert desk.job.result["patch"]["second_choice"], desk.job.to_json()
        assert desk.buffer.text == TEXT
        assert asked[0].endswith("It is the model's second choice: look at it first.")

    at_desk(tmp_path, story)


def test_some_hunks_can_be_applied_and_they_pass_the_gates_again(tmp_path: Path) -> None:
    answer = "def f(a):\n    b = a\n    # one\n    return b + 1\n"

    async def story(desk: Desk) -> None:
        patch_id = await desk.patch()
        from engine.errors import GateError, UsageError

        with pytest.raises(GateError, match="gate `names`"):
            await desk.bench.applier.apply(patch_id, [1])
        with pytest.raises(UsageError, match="are no hunks"):
            await desk.bench.applier.apply(patch_id, [2])
        done = await desk.bench.applier.apply(patch_id, [0])
        assert done == {"ok": True, "patchId": patch_id, "hunks": [0], "patchState": "applied"}
        assert desk.buffer.text == TEXT.replace("    # one", "    b = a\n    # one")

    at_desk(tmp_path, story, answer=answer, apply="ask")


def test_the_same_request_gets_the_same_proposal_and_a_rejected_one_never_again(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        first, again = await desk.patch(), await desk.patch()
        assert first == again
        assert len(desk.engine.requests) == 1
        await desk.bench.reject(first)
        assert await desk.patch() != first
        assert await desk.patch(fresh=True) != first

    at_desk(tmp_path, story, apply="ask")


def test_a_patch_of_a_text_that_changed_meanwhile_is_neither_asked_about_nor_applied(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.editor.on_ask = lambda message, choices: pytest.fail("asked about a patch that cannot be applied")

        def type_and_answer(prompt: str) -> Answer:
            loop.call_soon_threadsafe(desk.type, "# typed\n" + TEXT)
            time.sleep(0.05)
            return ANSWER

        loop = asyncio.get_running_loop()
        desk.engine._script = type_and_answer
        await desk.patch()
        assert desk.editor.edits == []
        assert desk.editor.messages == [
            "PlanPatch: f has a patch, but the text changed while it was written: ask again"
        ]

    at_desk(tmp_path, story)


def test_a_bug_ends_its_job_and_not_the_server(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        def broken(prompt: str) -> Answer:
            raise ZeroDivisionError("oops")

        desk.engine._script = broken
        await desk.patch()
        assert desk.job.state == "failed"
        assert desk.editor.messages[-1].startswith("PlanPatch: This is a bug in PlanPatch: ZeroDivisionError: oops")
        desk.engine._script = lambda prompt: ANSWER
        await desk.patch()
        assert desk.buffer.text == PATCHED

    at_desk(tmp_path, story)


def test_a_failed_device_is_noticed(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        desk.engine.fail("CUDA error: an illegal memory access")
        await desk.patch()
        assert desk.job.state == "failed"
        assert desk.bench.has_failed.is_set()
        assert "an illegal memory access" in desk.editor.messages[-1]

    at_desk(tmp_path, story)


def test_a_conflict_is_shown_three_ways_and_nothing_is_sent(tmp_path: Path) -> None:
    from engine.errors import StaleTextError

    async def story(desk: Desk) -> None:
        await desk.patch()
        desk.type(PATCHED.replace("a + 1", "a + 100"))
        count = len(desk.editor.edits)
        with pytest.raises(StaleTextError):
            await desk.bench.applier.turn("rollback", None, desk.path)
        assert len(desk.editor.edits) == count
        shown = desk.editor.shown[-1].read_text(encoding="utf-8")
        print(shown)
        assert all(text in shown for text in ("a - 1", "a + 1\n", "a + 100"))

    at_desk(tmp_path, story, profile=replace(PROFILE, has_show_document=True))


def test_a_patch_that_was_forgotten_meanwhile_is_watched_no_more_and_disturbs_nobody(tmp_path: Path) -> None:
    async def story(desk: Desk) -> None:
        first, second = await desk.patch(), ""
        with Ledger(tmp_path / "ledger.sqlite3") as ledger:
            ledger.forget(Forgettable(file=desk.path))
        shown = len(desk.editor.messages)
        desk.now += 601
        await desk.bench.labels.tick()
        desk.type(TEXT)
        await desk.rest()
        assert (await desk.entry(first)).state is State.FORGOTTEN
        assert desk.editor.messages[shown:] == []
        second = await desk.patch()
        assert (await desk.entry(second)).state is State.APPLIED

    at_desk(tmp_path, story)
