"""Paths over HTTP: read inside the root alone, links resolved; which function is meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import PathError
from lsp_server.http.edits import PlanBody, _find  # pyright: ignore[reportPrivateUsage]
from lsp_server.http.errors import HttpError
from lsp_server.http.service import Service
from lsp_server.model_host import ModelHost

TEXT = "def add(a, b):\n    return a - b\n\n\ndef area(a, b):\n    return a + b\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.py").write_text(TEXT)
    (folder / "inner" / "b.py").write_text("def other(x):\n    return x\n")
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "c.py").write_text("def secret(x):\n    return x\n")
    (tmp_path / "outside.py").write_text("def outside(x):\n    return x\n")
    (folder / "link.py").symlink_to(tmp_path / "outside.py")
    return folder


def found(root: Path | None, **body: Any) -> tuple[str, str]:
    service = Service(ModelHost(lambda status: None), lambda: None, None, "t", root=root)  # type: ignore[arg-type]
    source, scope = _find(service, PlanBody.model_validate({"intent": "change it", **body}))
    return Path(source.path).name, scope.qualname


@pytest.mark.parametrize("path", ["../outside.py", "link.py", "/etc/passwd", "inner/../../outside.py", "a.py\0"])
def test_what_is_outside_of_the_root_is_refused(path: str, root: Path) -> None:
    with pytest.raises(PathError):
        found(root, paths=[path])


def test_a_link_that_leads_back_to_itself_is_told_as_such(root: Path) -> None:
    """It was "it is no path"."""
    (root / "loop.py").symlink_to("loop.py")
    (root / "there.py").symlink_to("back.py")
    (root / "back.py").symlink_to("there.py")
    for name in ("loop.py", "there.py", "loop.py/x.py"):
        with pytest.raises(HttpError, match="is a symbolic link that leads back to itself") as caught:
            found(root, paths=[name])
        assert caught.value.status == 400


def test_without_a_root_no_path_is_read_and_nothing_is_scanned_unasked(root: Path) -> None:
    with pytest.raises(PathError, match="none is set"):
        found(None, paths=[str(root / "a.py")])
    with pytest.raises(HttpError, match="there is no code"):
        found(root, paths=[])


def test_the_function_is_the_named_one_or_the_one_the_intent_names_or_the_only_one(root: Path) -> None:
    assert found(root, paths=["a.py"], function="area") == ("a.py", "area")
    assert found(root, paths=["a.py"], intent="add() 음수 방지") == ("a.py", "add")
    assert found(root, paths=["inner/b.py"]) == ("b.py", "other")
    assert found(root, paths=["a.py"]) == ("a.py", "<module>")
    assert found(root, code_paste="def f(): return 1") == ("<code_paste>", "f")
    assert found(root, code_paste="broken(\n\n\ndef f():\n    return 1\n", function="f") == ("<code_paste>", "f")


def test_a_folder_is_searched_without_hidden_ones_and_links_out_of_it(root: Path) -> None:
    assert found(root, paths=["."], function="other") == ("b.py", "other")
    assert found(root, paths=["."], intent="mend area(): it is wrong") == ("a.py", "area")
    for name in ("secret", "outside", "nowhere"):
        with pytest.raises(HttpError, match="no function of these files is named"):
            found(root, paths=["."], function=name)
    (root / "inner" / "d.py").write_text("def other(y):\n    return y\n")
    with pytest.raises(HttpError, match="several functions are called other"):
        found(root, paths=["."], function="other")
