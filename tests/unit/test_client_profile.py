"""What a client can do, by its capabilities and by what is known of it."""

from __future__ import annotations

from typing import Any

import pytest

from lsp_server.editor import ClientProfile

BOTH = {"planpatch/status", "planpatch/job"}


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (None, set()),
        (False, set()),
        (True, BOTH),
        (["planpatch/job"], {"planpatch/job"}),
        (["job", "status", "other"], BOTH),
        ({"status": True, "job": False}, {"planpatch/status"}),
        ("job", set()),
        (3, set()),
    ],
)
def test_notifications_go_to_those_who_ask_in_one_of_several_ways(asked: Any, wanted: set[str]) -> None:
    assert ClientProfile.of("x", {}, "utf-16", {"notifications": asked}).notifications == wanted


def test_a_client_without_capabilities_is_asked_for_nothing_beyond_the_protocol() -> None:
    assert ClientProfile.of("", {}, "utf-16", {}) == ClientProfile("", "utf-16")


@pytest.mark.parametrize(
    ("options", "presents"),
    [
        ({"notifications": True, "presents": True}, True),
        ({"notifications": True, "presents": 1}, False),
        ({"notifications": ["job"], "presents": True}, False),  # it would hear of nothing that it says it shows
        ({"presents": True}, False),
    ],
)
def test_who_presents_by_itself_has_to_hear_of_everything(options: Any, presents: bool) -> None:
    assert ClientProfile.of("x", {}, "utf-16", options).presents is presents


def test_what_clients_do_beyond_their_word_is_known() -> None:
    assert ClientProfile.of("Neovim", {}, "utf-8", {}).has_versioned_edits
    disabled = {"textDocument": {"codeAction": {"disabledSupport": True}}}
    assert ClientProfile.of("x", disabled, "utf-8", {}).has_disabled_actions
    assert not ClientProfile.of("helix", disabled, "utf-8", {}).has_disabled_actions


def test_annotations_need_document_changes_and_may_be_an_empty_object() -> None:
    edit: dict[str, Any] = {"changeAnnotationSupport": {}}
    assert not ClientProfile.of("x", {"workspace": {"workspaceEdit": edit}}, "utf-8", {}).has_annotations
    edit["documentChanges"] = True
    assert ClientProfile.of("x", {"workspace": {"workspaceEdit": edit}}, "utf-8", {}).has_annotations
