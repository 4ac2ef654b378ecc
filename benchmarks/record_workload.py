"""Record the edits that `planpatch bench engine` replays: answers of a real model, and the tasks' own edits.

    python benchmarks/record_workload.py TASKS.jsonl --model qwen2.5-coder-1.5b-instruct --out bench_workload.jsonl.gz

An answer is kept when it passed every gate and changed the text; the others are counted. A reference is the text that
the task's author holds to be right, in the default format. Both are token ids after the very prompt of a PATCH.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from engine.errors import PlanPatchError
from engine.inference.protocol import Engine, SamplingParams
from engine.patching.formats import FORMATS
from engine.patching.patcher import Patcher, PatcherOptions
from engine.patching.source import Source
from lsp_server.bench_cases import Case, read_cases, scope_of
from lsp_server.bench_edit import MeteredEngine, without_time_limits
from lsp_server.session import Session


def main() -> None:
    """Read the options and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path, help="tasks with `before`, `after` and what bench cases reads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="qwen2.5-coder-1.5b-instruct")
    parser.add_argument("--machine", required=True, help="for the record")
    parser.add_argument("--batch", type=int, default=32, help="tasks in flight")
    parser.add_argument("--references-only", action="store_true", help="no model is loaded, only its tokenizer")
    given = parser.parse_args()
    session = Session.open(os.environ, {"model": given.model})
    local = session.local_model(session.model_ref(), lambda _: None)
    cases = read_cases(given.tasks)
    afters = {row["id"]: row["after"] for row in map(json.loads, given.tasks.read_text("utf-8").splitlines())}
    rows: list[dict[str, Any]] = []
    left_out: dict[str, Counter[str]] = {"answers": Counter(), "references": Counter()}
    with session.engine(local, session.model_ref()) as engine:
        if not given.references_only:
            engine.wait_until_ready()
            with ThreadPoolExecutor(given.batch) as workers:
                for row, reason in workers.map(lambda case: answer_of(engine, case), cases):
                    rows += [row] if row else []
                    left_out["answers"].update([reason] if reason else [])
        for case in cases:
            rows.append(reference_of(engine, case, afters[case.id]))
    head = {
        "made_with": {"model": given.model, "machine": given.machine, "date": date.today().isoformat()},
        "left_out": left_out,
    }
    text = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in (head, *rows))
    given.out.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{len(rows)} recordings, left out: {json.dumps(left_out)}")


def options() -> PatcherOptions:
    """PATCH as bench cases runs it, one attempt and no second choices: what is recorded is one answer."""
    made = without_time_limits(PatcherOptions())
    return replace(made, num_repairs=0, num_forks=0)


def answer_of(engine: Engine, case: Case) -> tuple[dict[str, Any] | None, str]:
    """What the model answers, or why that is left out."""
    metered = MeteredEngine(engine)
    source = Source.from_text(case.before, case.file_name)
    try:
        Patcher(metered, None, options()).patch(source, scope_of(case, source), case.intent)
    except PlanPatchError as error:
        return None, f"{error.code}:{error.details.get('gate') or error.details.get('budget') or ''}"
    generation = metered.generations[-1]
    return row(case, "answers", generation.request.prompt_token_ids, generation.completion.token_ids), ""


class Captured(Exception):
    """The request that a PATCH would make."""


class Capturing(MeteredEngine):
    """Stops at the first request."""

    def submit(self, request: Any) -> str:
        """Raise it."""
        raise Captured(request)


def reference_of(engine: Engine, case: Case, after: str) -> dict[str, Any]:
    """The author's text as the model would have had to write it."""
    source, target = Source.from_text(case.before, case.file_name), Source.from_text(after, case.file_name)
    try:
        Patcher(Capturing(engine), None, options()).patch(source, scope_of(case, source), case.intent)
    except Captured as captured:
        request = captured.args[0]
    else:
        raise AssertionError("a PATCH makes a request")
    params: SamplingParams = request.params
    scope = scope_of(case, target)
    text = "".join(after.splitlines(keepends=True)[scope.start_line - 1 : scope.end_line])
    assert FORMATS["rewrite"].name == "rewrite"
    token_ids = engine.tokenizer.encode(text.rstrip("\n") + params.stop[0])
    return row(case, "references", request.prompt_token_ids, token_ids)


def row(case: Case, workload: str, prompt: Any, answer: Any) -> dict[str, Any]:
    """A line of the file."""
    return {"id": case.id, "workload": workload, "prompt": list(prompt), "answer": list(answer)}


if __name__ == "__main__":
    main()
