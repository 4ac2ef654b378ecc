"""What a base model says itself, to hold its adapter to: answers for `first_adapter.py --held`.

    python benchmarks/own_answers.py MODEL TRAIN.jsonl[.gz] HELD.jsonl [--rows 1536]

Half of the questions are general rows of the data (a function from its docstring), half open wishes about the code of
edit rows ("make it faster"), which no single line grants. Greedy, through the engine, in the chat of the product.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

OPEN_WISHES = (
    "make it faster for large inputs",
    "Rewrite this so that it is easier to read. Keep what it does.",
    "validate every argument and raise a ValueError with a helpful message when one is wrong",
    "Add a parameter `verbose` (default False). When it is true, print what is done at every step.",
    "split the longest part into helper functions and use them",
    "Add a cache, so that the same arguments are not computed twice, and a way to clear it.",
    "Change this so that it accepts one value as well as a list of values, and returns a list in that case.",
    "count how often this is called and let callers read and reset the count",
    "Add logging: what comes in, what goes out, and every error with its cause.",
    "let it work when the input is None or empty, in every place where that can happen",
    "Write two more variants of this: one that returns a generator, one that returns a dictionary.",
    "turn this into a small class with a constructor, a method that does the work, and a `__repr__`",
    "Add a keyword argument `default` that is returned instead of an error, and handle every error path.",
    "make it thread-safe",
    "Add type hints to all parameters and results, and a docstring with an example.",
    "Replace the magic values by named constants with a comment for each.",
    "add an optional progress callback that is called with done and total",
    "Make this generic: take the operation as a function argument, with the present one as the default.",
    "return early wherever that removes a level of nesting, and rename variables that say too little",
    "Support both strings and bytes as input.",
)
_WISH, _AFTER_WISH = "## Instruction:\n", "\n## Code After:"
_MOST_TOKENS = 320
_LONGEST_ROW = 900
_AT_ONCE = 56


def main() -> None:
    """Ask every question, write one line for each as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=1536)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    data = gzip.decompress(args.train.read_bytes()) if args.train.suffix == ".gz" else args.train.read_bytes()
    rows = questions([json.loads(line) for line in data.splitlines() if line.strip()], args.rows, args.seed)
    answer(args.model, rows, args.out)


def questions(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Half general rows, half edit rows with an open wish in place of theirs."""
    rng = random.Random(seed)
    general = [row for row in rows if row["stage"] == "general"]
    edits = [row for row in rows if row["stage"] == "patch" and row["num_tokens"] <= _LONGEST_ROW]
    general, edits = (rng.sample(some, min(count // 2, len(some))) for some in (general, edits))
    asked = [{"input": row["input"], "prefill": row["prefill"]} for row in general]
    for number, row in enumerate(edits):
        head, wish = row["input"].rsplit(_WISH, 1)
        tail = wish[wish.index(_AFTER_WISH) :]
        wanted = OPEN_WISHES[number % len(OPEN_WISHES)]
        asked.append({"input": head + _WISH + wanted + tail, "prefill": row["prefill"]})
    return asked


def answer(model: str, rows: list[dict[str, Any]], path: Path) -> None:
    """Write each row with the model's answer; `is_cut` where it would have gone on."""
    from engine.inference.protocol import Completion, FinishReason, GenerationRequest, Message, SamplingParams
    from lsp_server.cli_options import open_engine, open_session

    session = open_session({"model": model, "adapter": "__none__", "quantization": "bf16"}, None, False)
    started_at, num_tokens = time.monotonic(), 0
    with open_engine(session, False) as engine, path.open("w", encoding="utf-8") as out:

        def ask(row: dict[str, Any]) -> tuple[dict[str, Any], int]:
            ids = tuple(engine.tokenizer.encode_chat([Message("user", row["input"])], prefill=row["prefill"]))
            request = GenerationRequest(ids, SamplingParams(max_new_tokens=_MOST_TOKENS))
            for event in engine.stream(engine.submit(request)):
                if isinstance(event, Completion):
                    is_cut = event.finish_reason is FinishReason.LENGTH
                    made = {"output": row["prefill"] + event.text, "stage": "general", "is_cut": is_cut}
                    return {**row, **made}, len(event.token_ids)
            raise AssertionError("a stream ends with a Completion")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for line, count in pool.map(ask, rows):
                out.write(json.dumps(line) + "\n")
                num_tokens += count
    seconds = time.monotonic() - started_at
    print(f"{len(rows)} answers, {num_tokens:,} tokens, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
