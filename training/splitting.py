"""Which part is held out: whole repositories, or whole files where one repository is nearly all there is.

Two that share a function, word for word, stay on one side, so a copied file leaks nothing. The choice depends on what
there is, not on its order: the same records give the same split.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

LEAST_SHARE, MOST_SHARE, BEST_SHARE = 0.10, 0.20, 0.15
_MAX_STARTS = 200


@dataclass(frozen=True, slots=True)
class Placed:
    """Where a record belongs.

    Args:
        name: The record.
        repository: Its repository; the file where there is none.
        file: Its file.
        function: Digest of its function's text before.
    """

    name: str
    repository: str
    file: str
    function: str


@dataclass(frozen=True, slots=True)
class Split:
    """What is held out.

    Args:
        held_out: Names of records.
        unit: `repository` or `file`; empty if nothing could be held out.
        num_groups: How many groups of them there are.
        group_of: Group of each record, as a short digest.
    """

    held_out: frozenset[str]
    unit: str
    num_groups: int
    group_of: Mapping[str, str]


def split(records: Sequence[Placed]) -> Split:
    """Hold out 10 to 20%, in whole groups.

    Args:
        records: All records.

    Returns:
        The split; nothing is held out where no choice of groups gives 10 to 20%.
    """
    groups: dict[str, list[str]] = {}
    has_repositories = any(record.repository != record.file for record in records)
    for unit in ("repository", "file") if has_repositories else ("file",):
        groups = _groups(records, [record.repository if unit == "repository" else record.file for record in records])
        held_out = _chosen(groups)
        if held_out:
            names = frozenset(name for group in held_out for name in groups[group])
            return Split(names, unit, len(groups), _group_of(groups))
    return Split(frozenset(), "", len(groups), _group_of(groups))


def _groups(records: Sequence[Placed], keys: Sequence[str]) -> dict[str, list[str]]:
    """Records by group: those of one key, and of keys that share a function (union-find)."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for record, key in zip(records, keys, strict=True):
        one, other = sorted((root(f"key {key}"), root(f"function {record.function}")))
        parent[other] = one
    members: dict[str, list[str]] = defaultdict(list)
    for record, key in zip(records, keys, strict=True):
        members[root(f"key {key}")].append(record.name)
    return {_digest(group): sorted(names) for group, names in members.items()}


def _digest(group: str) -> str:
    return hashlib.sha256(group.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _group_of(groups: Mapping[str, list[str]]) -> dict[str, str]:
    return {name: group for group, names in groups.items() for name in names}


def _chosen(groups: Mapping[str, list[str]]) -> list[str]:
    """Groups with 10 to 20% of the records, as near to 15% as a walk from some start comes; none if none is found."""
    total = sum(map(len, groups.values()))
    order = sorted(groups)
    best: list[str] = []
    best_distance = 1.0
    for start in range(min(len(order), _MAX_STARTS)):
        chosen: list[str] = []
        count = 0
        for group in [*order[start:], *order[:start]]:
            if count + len(groups[group]) <= MOST_SHARE * total and count < BEST_SHARE * total:
                chosen.append(group)
                count += len(groups[group])
        distance = abs(count / total - BEST_SHARE)
        if count >= LEAST_SHARE * total and distance < best_distance - 1e-9:
            best, best_distance = chosen, distance
    return best
