"""Edits that a real model wrote, recorded once as tokens, to be replayed on models of any size.

A model with random weights drafts and verifies as a real one would when the tokens that it chooses are given. There are
two workloads: `answers` of a 1.5B that passed the gates and changed the text, and `references`, the edits that the
tasks' authors hold to be right, in the default format. `benchmarks/record_workload.py` made the file.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from engine.errors import PathError, UsageError

WorkloadName = Literal["answers", "references"]
_LEAST_TOKENS = 2000  # of prompts, from which others are made
DEFAULT_FILE = Path(__file__).parent / "bench_workload.jsonl.gz"


@dataclass(frozen=True, slots=True)
class Recording:
    """One PATCH.

    Args:
        id: The task.
        workload: Which of the two it belongs to.
        prompt: Token ids of the prompt.
        answer: Token ids of the answer.
    """

    id: str
    workload: WorkloadName
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Workload:
    """All recordings.

    Args:
        recordings: In the tasks' order.
        left_out: How many tasks have no recording, by workload and reason.
        made_with: Model, machine and date.
    """

    recordings: tuple[Recording, ...]
    left_out: Mapping[str, Mapping[str, int]]
    made_with: Mapping[str, str]

    def of(self, name: WorkloadName, limit: int | None = None) -> list[Recording]:
        """The recordings of one workload; with a limit, some that are spread over all of it.

        Args:
            name: Which.
            limit: At most so many.

        Returns:
            The recordings.
        """
        chosen = [one for one in self.recordings if one.workload == name]
        step = 1.0 if limit is None else max(1.0, len(chosen) / limit)
        return [chosen[int(index * step)] for index in range(len(chosen)) if int(index * step) < len(chosen)][:limit]


def read_workload(path: Path = DEFAULT_FILE) -> Workload:
    """Read a file of recordings.

    Args:
        path: gzipped JSON lines; the first says how they were made.

    Returns:
        The recordings.

    Raises:
        PathError: It cannot be read.
        UsageError: It is no file of recordings.
    """
    try:
        packed = path.read_bytes()
    except OSError as error:
        raise PathError(f"{path} cannot be read: {error.strerror or error}", hint="Check the path.") from None
    try:
        lines = gzip.decompress(packed).decode("utf-8").splitlines()
        head, *rows = [cast("dict[str, Any]", json.loads(line)) for line in lines]
        recordings = tuple(_recording(row) for row in rows)
        if sum(len(one.prompt) for one in recordings if one.workload == "references") < _LEAST_TOKENS:
            raise ValueError(f"the prompts of its references have fewer than {_LEAST_TOKENS} tokens")
        return Workload(recordings, head["left_out"], head["made_with"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, zlib.error) as error:
        raise UsageError(
            f"{path} is no recorded workload: {error}", hint="benchmarks/record_workload.py makes one."
        ) from None


def _recording(row: dict[str, Any]) -> Recording:
    if row["workload"] not in ("answers", "references"):
        raise ValueError(f"{row['workload']!r} is no workload")
    prompt, answer = tuple(row["prompt"]), tuple(row["answer"])
    if not (prompt and answer and all(type(token_id) is int and token_id >= 0 for token_id in (*prompt, *answer))):
        raise ValueError(f"{row['id']}: prompt and answer are lists of token ids")
    return Recording(row["id"], row["workload"], prompt, answer)
