"""The one door from the surfaces to `training`, opened lazily: the journal of a session."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from engine.patching.ledger import Ledger
from lsp_server.session import Session
from lsp_server.settings import load_settings, opts_out

if TYPE_CHECKING:
    from training.consent import Consent
    from training.forget import Places
    from training.journal import Journaled


def places_of(session: Session) -> Places:
    """Where a session's home keeps what is learnt from.

    Args:
        session: Names the home.

    Returns:
        The places.
    """
    from training.forget import Places

    paths = session.paths
    return Places(
        paths.home,
        paths.success_logs,
        paths.training_data,
        paths.plans,
        paths.models,
        paths.ledger,
        paths.qlora_out,
    )


def consent_of(session: Session) -> Consent:
    """What may be learnt from: the switch, the user's setting, and the workspaces that opted out.

    Args:
        session: Names the home and the settings.

    Returns:
        The consent; each pyproject.toml is read once.
    """
    from training.consent import Consent, LogSwitch

    settings = session.settings
    is_a_workspaces = settings.source_of("training_log").partition(": ")[0].endswith("pyproject.toml")
    is_allowed = settings.training_log or is_a_workspaces  # a workspace speaks for its own files alone
    users_own, _ = load_settings(env=os.environ, user_toml=session.paths.user_settings)
    switch = LogSwitch(session.paths.training / "log.json")
    return Consent(switch, is_allowed and users_own.training_log, cache(opts_out))


def journal(session: Session, ledger: Ledger) -> Journaled:
    """Bring the journal up to date.

    Args:
        session: Names the home and the settings.
        ledger: The ledger.

    Returns:
        What was written and left out.

    Raises:
        LedgerError: Ledger or switch cannot be read, or another process writes the journal for too long.
        WriteError: The journal cannot be written.
    """
    from training.journal import bring_up_to_date
    from training.journal_file import JournalFile

    return bring_up_to_date(JournalFile(session.paths.success_logs), ledger, consent_of(session))


def keep_journal(session: Session, ledger: Ledger) -> None:
    """Bring the journal up to date before retention drops anything; nothing to do for a ledger without proposals.

    Args:
        session: Names the home and the settings.
        ledger: The ledger.

    Raises:
        LedgerError: Ledger or switch cannot be read, or another process writes the journal for too long.
        WriteError: The journal cannot be written.
    """
    if ledger.last_events():
        journal(session, ledger)
