"""The data set: what of the journal a model is trained on, and what is held out.

Every line has `input`, the question of PATCH as it was asked, and `output`, the whole answer; both are text. The files
depend on the journal alone: the same journal gives the same bytes.

Not covered: whether an example fits a model's context (training knows its tokenizer), and preference pairs, which stay
in the journal.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.errors import UsageError
from engine.patching.disk import write_atomically
from engine.patching.masking import mask_together
from engine.patching.patcher import SECOND_CHOICE
from training.sanitize import Mended, mend_file
from training.similarity import (
    LEAST_SIMILAR_FUNCTION,
    NearIndex,
    fingerprint,
    jaccard,
    shingles,
    tokens_of,
)
from training.splitting import Placed, split

TRAIN_NAME, VAL_NAME, BASE_NAME = "train_from_logs.jsonl", "val_from_logs.jsonl", "train_from_logs.base.jsonl"
MANIFEST_NAME = "manifest.json"
REASONS = {
    "withdrawn": "taken back since",
    "withheld": "secrets that could not be masked, or a function that is gone",
    "opted_out": "the workspace opted out",
    "not_reviewed": "nobody reviewed it; --include unreviewed takes it all the same",
    "second_choice": "unreviewed, and the model's likeliest answer was to change nothing",
    "other_prompt": "its prompt cannot be rebuilt as it was",
    "not_exact": "its answer cannot be written so that it gives the kept text",
    "unchanged": "the kept function is the function before",
    "superseded": "the same question has a later answer",
    "exact_duplicate": "the same question and answer is there",
    "near_duplicate": "nearly the same edit is there",
    "in_validation": "a line of the base that is nearly one that is held out",
}


@dataclass(frozen=True, slots=True)
class Options:
    """What goes into a data set.

    Args:
        with_unreviewed: Whether edits count that nobody reviewed.
        base: A data set of others that is put in front.
    """

    with_unreviewed: bool = False
    base: Path | None = None


@dataclass(slots=True)
class Built:
    """What was made.

    Args:
        num_train: Lines to train on, those of the base included.
        num_val: Lines held out.
        num_base: Lines of the base.
        unit: What was kept whole: `repository` or `file`; empty if nothing was held out.
        num_groups: How many of them there are.
        dropped: Ids of what was left out, by reason.
        files: The files, by what they are.
        base: What was mended in the base.
    """

    num_train: int = 0
    num_val: int = 0
    num_base: int = 0
    unit: str = ""
    num_groups: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict[str, "list[str]"])
    files: dict[str, Path] = field(default_factory=dict[str, Path])
    base: Mended | None = None

    def drop(self, reason: str, name: str) -> None:
        """Leave a record out.

        Args:
            reason: One of `REASONS`.
            name: The record.
        """
        self.dropped.setdefault(reason, []).append(name)

    def to_json(self) -> dict[str, Any]:
        """The counts, for programs."""
        return {
            "train": self.num_train,
            "val": self.num_val,
            "base": self.num_base,
            "split_by": self.unit,
            "groups": self.num_groups,
            "dropped": {reason: len(self.dropped[reason]) for reason in REASONS if reason in self.dropped},
            "dropped_ids": {reason: self.dropped[reason] for reason in REASONS if reason in self.dropped},
            "files": {name: str(path) for name, path in self.files.items()},
            "base_mended": None if self.base is None else self.base.to_json(),
        }


def build(
    records: Iterable[Mapping[str, Any]], folder: Path, options: Options, opted_out: Mapping[str, str] | None = None
) -> Built:
    """Make the data set.

    Args:
        records: The journal's.
        folder: `training/data`.
        options: What goes in.
        opted_out: Paths whose workspace opted out by now.

    Returns:
        What was made.

    Raises:
        PathError: The base cannot be read.
        UsageError: The base has no usable line, or is a file of this folder.
        WriteError: A file cannot be written.
    """
    built = Built()
    kept = _without_duplicates(_usable(records, options, opted_out or {}, built), built)
    division = split([_placed(record) for record in kept])
    built.unit, built.num_groups = division.unit, division.num_groups
    lines = {record["id"]: _line(record, division.group_of[record["id"]]) for record in kept}
    val = [lines[name] for name in sorted(lines) if name in division.held_out]
    train = [lines[name] for name in sorted(lines) if name not in division.held_out]
    base = [] if options.base is None else _base_lines(options.base, folder, [*train, *val], val, built)
    built.num_train, built.num_val, built.num_base = len(base) + len(train), len(val), len(base)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if options.base is not None:
        _write(built, "base", folder / BASE_NAME, base)
    _write(built, "val", folder / VAL_NAME, val)  # before train: a kill in between leaves nothing of val in train
    _write(built, "train", folder / TRAIN_NAME, [*base, *train])
    _write_manifest(built, folder / MANIFEST_NAME, options)
    return built


# --- what is usable --------------------------------------------------------------------------------------------------


def _usable(
    records: Iterable[Mapping[str, Any]], options: Options, opted_out: Mapping[str, str], built: Built
) -> list[Mapping[str, Any]]:
    usable: list[Mapping[str, Any]] = []
    for record in records:
        if record["kind"] == "preference":
            continue
        reason = _reason_against(record, options, opted_out)
        if reason:
            built.drop(reason, record["id"])
        else:
            usable.append(record)
    return usable


def _reason_against(record: Mapping[str, Any], options: Options, opted_out: Mapping[str, str]) -> str:
    if record["kind"] in ("withdrawn", "withheld"):
        return record["kind"]
    if opted_out.get(record["path"] or ""):
        return "opted_out"
    if record["label"] != "accepted":
        if not options.with_unreviewed:
            return "not_reviewed"
        if SECOND_CHOICE in record["repairs"]:
            return "second_choice"
    if not record["is_same_prompt"]:
        return "other_prompt"
    if not record["is_exact"]:
        return "not_exact"
    return "unchanged" if record["kept"] == record["function"] else ""


def _without_duplicates(records: Sequence[Mapping[str, Any]], built: Built) -> list[Mapping[str, Any]]:
    """Accepted before unreviewed, the latest first; what is the same or nearly so as one before is left out."""
    ranked = sorted(records, key=lambda record: record["id"])
    ranked.sort(key=lambda record: record["kept_at"], reverse=True)
    ranked.sort(key=lambda record: record["label"] != "accepted")
    pairs: set[str] = set()
    questions: set[str] = set()
    near = NearIndex()
    kept: list[Mapping[str, Any]] = []
    for record in ranked:
        question, pair = _digest(_input(record)), _digest(_input(record), _output(record))
        print_of = fingerprint(record["function"], record["kept"])
        if pair in pairs:
            built.drop("exact_duplicate", record["id"])
        elif question in questions:
            built.drop("superseded", record["id"])
        elif near.find(print_of) is not None:
            built.drop("near_duplicate", record["id"])
        else:
            kept.append(record)
            near.add(record["id"], print_of)
        pairs.add(pair)
        questions.add(question)
    for names in built.dropped.values():
        names.sort()
    return sorted(kept, key=lambda record: record["id"])


def _placed(record: Mapping[str, Any]) -> Placed:
    file = record["path"] or f"pasted {_digest(record['function'])}"
    return Placed(record["id"], record["repository"] or file, file, _digest(*tokens_of(record["function"])))


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


# --- lines -----------------------------------------------------------------------------------------------------------


def _input(record: Mapping[str, Any]) -> str:
    return "\n".join(message["content"] for message in record["messages"])


def _output(record: Mapping[str, Any]) -> str:
    return f"{record['prefill']}{record['answer']}"


def _line(record: Mapping[str, Any], group: str) -> dict[str, Any]:
    question, answer = mask_together([_input(record), _output(record)]).texts  # rules that are newer than the journal
    return {
        "id": record["id"],
        "instruction": "",
        "input": question,
        "output": answer,
        "prefill": record["prefill"],
        "label": record["label"],
        "group": group,
        "model": record["model"],
        "prompt_version": record["prompt_version"],
    }


def _base_lines(
    base: Path, folder: Path, ours: Sequence[Mapping[str, Any]], val: Sequence[Mapping[str, Any]], built: Built
) -> list[dict[str, Any]]:
    """Lines of a data set of others, mended and masked, without what is ours already or nearly what is held out."""
    if base.resolve() in {(folder / name).resolve() for name in (TRAIN_NAME, VAL_NAME)}:
        raise UsageError(
            f"{base} is what this command writes", hint=f"Name another base, such as {folder / BASE_NAME}."
        )
    built.base = mend_file(base)
    if not built.base.rows:
        raise UsageError(f"{base} has no usable line", hint=f"planpatch train sanitize {base} says why.")
    held_out = [_output_print(line) for line in val]
    known = {_digest(str(line["input"]), str(line["output"])) for line in ours}
    lines: list[dict[str, Any]] = []
    for number, row in enumerate(built.base.rows, 1):
        name = f"base:{number}"
        line = {"id": name, **row}
        pair = _digest(row["instruction"], row["input"], row["output"])
        if pair in known or _digest(row["input"], row["output"]) in known:
            built.drop("exact_duplicate", name)
        elif any(jaccard(_output_print(line), other) >= LEAST_SIMILAR_FUNCTION for other in held_out):
            built.drop("in_validation", name)
        else:
            lines.append(line)
        known.add(pair)
    return lines


def _output_print(line: Mapping[str, Any]) -> frozenset[int]:
    return shingles(tokens_of(str(line["output"])))


# --- files -----------------------------------------------------------------------------------------------------------


def _write(built: Built, name: str, path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, data.encode("utf-8", "backslashreplace"), expected_sha256=None, private=True)
    built.files[name] = path


def _write_manifest(built: Built, path: Path, options: Options) -> None:
    """What the files are made of, without a path or a text of the user's."""
    facts = {
        "train": built.num_train,
        "val": built.num_val,
        "base": built.num_base,
        "split_by": built.unit,
        "groups": built.num_groups,
        "with_unreviewed": options.with_unreviewed,
        "dropped": dict(sorted(Counter({reason: len(names) for reason, names in built.dropped.items()}).items())),
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(built.files.values())},
    }
    write_atomically(path, (json.dumps(facts, indent=1) + "\n").encode(), expected_sha256=None, private=True)
    built.files["manifest"] = path
