"""A process that keeps edits and journals them until it is killed.

`keep HOME CODE FIRST` proposes, applies and accepts edits for ever, and brings the journal up to date after each; what
it accepted is on stdout, one id a line. `forget HOME FOLDER` forgets a folder and says so.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

from engine.errors import UsageError
from engine.patching.ledger import Forgettable, Ledger
from tests.learning import accepted
from training.consent import Consent, LogSwitch
from training.forget import Places, forget
from training.journal import bring_up_to_date
from training.journal_file import JournalFile


def places_in(home: Path) -> Places:
    """A home's places as the command line has them."""
    training = home / "training"
    folders = training / "success_logs", training / "data", home / "plans", home / "models"
    return Places(home, *folders, home / "ledger.sqlite3", training / "qlora-out")


def consent_in(home: Path) -> Consent:
    """Consent to everything."""
    return Consent(LogSwitch(home / "training" / "log.json"))


def keep_edits(home: Path, code: Path, first: int) -> None:
    """Keep edits and journal them, for ever."""
    places = places_in(home)
    with Ledger(places.ledger) as ledger:
        print("ready", flush=True)
        for number in itertools.count(first):
            text = f"def f{number}(a):\n    b = a + {number}\n    return b\n"
            file = code / f"m{number}.py"
            try:
                print(accepted(ledger, file, text, text.replace("return b", "return -b"), f"f{number}"), flush=True)
            except UsageError as error:  # forgotten by another process before it was accepted
                assert "forgotten" in error.message, error.message
                continue
            bring_up_to_date(JournalFile(places.journal), ledger, consent_in(home))


def main(arguments: list[str]) -> None:
    """Do what the arguments say."""
    task, home, folder = arguments[0], Path(arguments[1]), Path(arguments[2])
    if task == "keep":
        keep_edits(home, folder, int(arguments[3]))
    with Ledger(home / "ledger.sqlite3") as ledger:
        print("ready", flush=True)
        done = forget(places_in(home), ledger, Forgettable(folder=folder))
        print(done.num_proposals, flush=True)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
