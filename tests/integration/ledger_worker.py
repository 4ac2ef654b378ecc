"""A process that uses a ledger until it is killed, and the files that it works on.

`loop LEDGER FOLDER SEED` proposes, applies, rolls back and redoes for ever; `propose LEDGER NUMBER` proposes that
often; `apply LEDGER` applies the proposals named on its stdin, one a line; `fill LEDGER BYTES` proposes until the
ledger's file may not grow any more; `write FILE` replaces a file by a larger one.
"""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

from engine.errors import PlanPatchError
from engine.patching.disk import sha256_hex, write_atomically
from engine.patching.edits import Edit, apply_edits
from engine.patching.ledger import Ledger, Proposal
from engine.patching.source import Source

BASES = {
    "unix 🐍.py": b"import os\n\n\n@decorated\ndef f(a):\n    def inner():\n        return a\n    return inner()\n",
    "windows.py": b"\xef\xbb\xbfdef f(a):\r\n\tb = a\x0c\r\n\treturn b\r\n\r\ndef g(a):\r\n\tb = a\r\n\treturn b",
    "large.py": b"".join(b"def f%d(a):\n    return a\n\n\n" % number for number in range(2_000)),
}
CHANGES = {
    "unix 🐍.py": [(7, 7, "        return a.strip()  # 🐍"), (9, 8, "\n\nx = f('a')")],
    "windows.py": [(2, 3, "\treturn a"), (6, 6, "\tb = a + a\r\n\tb = b")],
    "large.py": [(2, 2, "    return a + 0"), (4_002, 4_002, "    return a + 1")],
}


def edits_of(name: str) -> list[Edit]:
    """The one patch that is ever made of a file."""
    base = Source.from_bytes(BASES[name], name)
    return [
        Edit(name, "insert" if stop < start else "replace", start, stop, base.text_between(start, stop), new)
        for start, stop, new in CHANGES[name]
    ]


def versions(name: str) -> dict[tuple[int, ...], bytes]:
    """Every text that a file may ever have, by the hunks that are in it."""
    base, edits = Source.from_bytes(BASES[name], name), edits_of(name)
    choices: list[tuple[int, ...]] = [(), (0,), (1,), (0, 1)]
    return {chosen: apply_edits(base, [edits[index] for index in chosen]).to_bytes() for chosen in choices}


def proposal(path: Path, name: str, key: str = "key") -> Proposal:
    """The patch as a proposal."""
    return Proposal(
        key=key,
        path=path,
        scope="f",
        scope_kind="function",
        start_line=1,
        end_line=2,
        base=BASES[name],
        patched=versions(name)[0, 1],
        edits=tuple(edits_of(name)),
        surface="cli",
    )


def loop(ledger: Ledger, folder: Path, seed: int) -> None:
    """Turn the patches of all files on and off."""
    choose = random.Random(seed)
    while True:
        name = choose.choice(sorted(BASES))
        step(ledger, folder / name, choose)


def step(ledger: Ledger, path: Path, choose: random.Random) -> None:
    """Turn one file's patch on or off."""
    applied, rolled_back = ledger.last_applied(path), ledger.last_rolled_back(path)
    if applied is not None:
        ledger.rollback(applied.id)
    elif rolled_back is not None and choose.random() < 0.5:
        ledger.redo(rolled_back.id)
    else:
        ledger.apply(ledger.propose(proposal(path, path.name)), choose.choice([None, [0], [1]]))


def apply_named(ledger: Ledger) -> None:
    """Apply what stdin names, and say how each went."""
    for line in sys.stdin:
        try:
            ledger.apply(line.strip())
            print("applied", flush=True)
        except PlanPatchError as error:
            print(error.code, flush=True)


def fill(ledger: Ledger, max_bytes: int) -> None:
    """Propose until no file may grow any more, then once more with room again."""
    import resource

    name = "unix 🐍.py"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, limits[1]))
    count = 0
    try:
        while True:
            noise = proposal(Path(name).absolute(), name)
            ledger.propose(Proposal(**{**_fields(noise), "diff": os.urandom(2_000).hex()}))
            count += 1
    except PlanPatchError as error:
        print(error.code, error.message)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ledger.propose(proposal(Path(name).absolute(), name))
    print(count + 1)


def _fields(made: Proposal) -> dict[str, object]:
    return {name: getattr(made, name) for name in Proposal.__slots__}


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    task, where = arguments[0], Path(arguments[1])
    if task == "write":
        try:
            write_atomically(where, b"x" * 10_000_000, expected_sha256=sha256_hex(where.read_bytes()))
        except PlanPatchError as error:
            print(error.code, error.message)
        return
    ledger = Ledger(where)
    print("ready", flush=True)
    if task == "loop":
        loop(ledger, Path(arguments[2]), int(arguments[3]))
    elif task == "propose":
        for number in range(int(arguments[2])):
            ledger.propose(proposal(where.with_name("unix 🐍.py"), "unix 🐍.py", key=f"{os.getpid()} {number}"))
    elif task == "apply":
        apply_named(ledger)
    elif task == "fill":
        fill(ledger, int(arguments[2]))
    ledger.close()


if __name__ == "__main__":
    main(sys.argv[1:])
