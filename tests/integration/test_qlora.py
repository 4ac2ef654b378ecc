"""The trainer with real models of a few thousand weights: packing, resuming over kills, refusals, what is left."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.errors import CancelledError, EngineError, EnvironmentFault, ModelError, UsageError
from engine.inference.adapters import check_fits, read_adapter
from engine.inference.loading import read_weights
from engine.inference.tokenizer import HFChatTokenizer
from tests.training_model import make_base, row, write_config, write_rows
from training import qlora, qlora_run
from training.qlora_config import read_config
from training.qlora_data import check_rows_are_apart, collate, pack, read_examples
from training.qlora_memory import check_memory, needed_bytes, read_shapes

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("models") / "tiny")


def request_of(base: Path, folder: Path, num_rows: int = 40, **values: Any) -> qlora.Request:
    beside = {key: values.pop(key) for key in ("resume", "discard", "force", "num_gpus") if key in values}
    return qlora.Request(
        config=read_config(write_config(folder / "config.json", **values)),
        model=base,
        model_name="tiny",
        model_digest=qlora.digest_of(base),
        data=write_rows(folder / "train.jsonl", [row(number) for number in range(num_rows)]),
        val=write_rows(folder / "val.jsonl", [row(number) for number in range(1000, 1006)]),
        out=folder / "out",
        device="cpu",
        **beside,
    )


def losses_of(adapter: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (adapter / "losses.jsonl").read_text().splitlines()]


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama"])
def test_packed_rows_have_the_loss_and_gradients_of_their_examples_alone(tmp_path: Path, family: str) -> None:
    import torch

    folder = make_base(tmp_path / family, family)
    data = write_rows(tmp_path / "d.jsonl", [row(number, number % 50) for number in range(12)])
    examples = read_examples(data, HFChatTokenizer(folder), 512).usable
    packed = pack(examples, 512)
    assert len(packed) < len(examples) / 2
    found: list[tuple[float, torch.Tensor]] = []
    for rows in (packed, [(example,) for example in examples]):
        model: Any = read_weights(folder, "cpu", "fp32", "float32")
        weight = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
        total = 0.0
        for one in rows:
            batch = collate([one], pad_to=520)
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum")
            loss.backward()
            total += loss.item()
        found.append((total, weight.grad))
    (one, one_gradient), (other, other_gradient) = found
    assert one == pytest.approx(other, rel=1e-6)
    torch.testing.assert_close(one_gradient, other_gradient, rtol=1e-4, atol=1e-5)


def test_a_model_whose_examples_see_each_other_is_refused(base: Path) -> None:
    model: Any = read_weights(base, "cpu", "fp32", "float32")
    check_rows_are_apart(model, 288)
    forward = model.model.forward

    def without_positions(*args: Any, position_ids: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.model.forward = without_positions
    with pytest.raises(EngineError, match="see each other"):
        check_rows_are_apart(model, 288)


# --- a run -----------------------------------------------------------------------------------------------------------


def test_an_adapter_is_trained_told_of_and_loaded(base: Path, tmp_path: Path) -> None:
    told: list[qlora_run.Progress] = []
    adapter = qlora.train(request_of(base, tmp_path, num_epochs=3), told.append)
    assert adapter == tmp_path / "out" / "tiny-v1"
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["tiny-v1"]
    names = ["adapter_config.json", "adapter_model.safetensors", "loss.png", "losses.jsonl", "manifest.json"]
    assert sorted(path.name for path in adapter.iterdir()) == names
    assert (adapter / "loss.png").read_bytes().startswith(b"\x89PNG")
    losses = losses_of(adapter)
    assert losses[-1] < losses[0] - 0.3

    assert told[0].state == "preparing" and told[-1].state == "done"
    steps = [one for one in told if one.state == "training" and one.step]
    assert [one.step for one in steps] == list(range(1, len(losses) + 1))
    assert steps[-1].left_s == 0 and all(one.left_s and one.left_s > 0 for one in steps[:-1])

    manifest = json.loads((adapter / "manifest.json").read_text())
    assert manifest["base"] == {"name": "tiny", "digest": qlora.digest_of(base), "quantization": "none"}
    assert manifest["data"]["train"]["used"] == 40 and manifest["data"]["val"]["used"] == 6
    assert manifest["hyperparameters"]["seed"] == 0
    assert manifest["held_out"]["loss_after"] < manifest["held_out"]["loss_before"]
    assert manifest["versions"]["trl"]
    everything = b"".join(path.read_bytes() for path in adapter.iterdir())
    assert str(tmp_path).encode() not in everything and str(base).encode() not in everything

    files = read_adapter(adapter)
    assert (files.rank, files.base_model) == (4, "tiny")
    check_fits(files, read_weights(base, "cpu", "fp32", "float32"))


def test_the_loss_of_what_was_held_out_is_that_of_the_saved_adapter(base: Path, tmp_path: Path) -> None:
    import torch

    request = request_of(base, tmp_path)
    adapter = qlora.train(request, lambda _: None)
    said = json.loads((adapter / "manifest.json").read_text())["held_out"]
    assert request.val is not None
    examples = read_examples(request.val, HFChatTokenizer(base), 256).usable
    model: Any = read_weights(base, "cpu", "fp32", "float32")
    for name in ("loss_before", "loss_after"):
        total = 0.0
        for example in examples:
            batch = collate([(example,)])
            with torch.no_grad():
                logits = model(input_ids=batch["input_ids"]).logits
            total += float(torch.nn.functional.cross_entropy(logits[0, :-1], batch["labels"][0, 1:], reduction="sum"))
        assert total / said["answer_tokens"] == pytest.approx(said[name], rel=1e-5)
        if name == "loss_before":
            model.load_adapter(str(adapter))


def test_versions_count_up_and_the_same_request_gives_the_same_losses(base: Path, tmp_path: Path) -> None:
    first = qlora.train(request_of(base, tmp_path), lambda _: None)
    second = qlora.train(request_of(base, tmp_path, rows_at_once=2), lambda _: None)
    assert (first.name, second.name) == ("tiny-v1", "tiny-v2")
    assert losses_of(second) == pytest.approx(losses_of(first), rel=1e-3)  # dropout draws in another order
    assert read_adapter(first).digest != read_adapter(second).digest


# --- cut off and resumed ---------------------------------------------------------------------------------------------


@contextmanager
def trainer_process(base: Path, folder: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    arguments = ["--model", str(base), "--data", str(folder / "train.jsonl"), "--val", str(folder / "val.jsonl")]
    command = [sys.executable, "-X", "utf8", "-m", "training.qlora", str(folder / "config.json"), *arguments]
    process = subprocess.Popen(
        [*command, "--out", str(folder / "out"), "--device", "cpu", *options],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def kill_at(process: subprocess.Popen[str], words: str) -> None:
    """kill -9 as soon as the process says so."""
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if words in line:
            process.kill()
            assert process.wait() != 0
            return
    raise AssertionError("".join(said))


@pytest.mark.long
def test_a_run_that_is_killed_again_and_again_has_the_losses_of_one_that_is_not(base: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    expected = losses_of(qlora.train(request_of(base, whole, num_rows=60, num_epochs=2), lambda _: None))
    request_of(base, cut, num_rows=60, num_epochs=2)
    assert len(expected) > 12

    partial = cut / "out" / ".tiny-v1.partial"
    for words, options in (
        ("step 1/", ()),
        ("step 5/", ("--resume",)),
        ("step 10/", ("--resume",)),
        ("finishing", ("--resume",)),
    ):
        with trainer_process(base, cut, *options) as process:
            kill_at(process, words)
        assert [path.name for path in (cut / "out").iterdir()] == [partial.name]
        assert not list((cut / "out").glob("[!.]*"))
    (partial / "checkpoints" / "checkpoint-99").mkdir()  # as a kill while it is written leaves it
    (partial / "checkpoints" / "checkpoint-99" / "adapter_model.safetensors").write_bytes(b"half")

    with pytest.raises(UsageError, match="was cut off") as caught:
        qlora.train(request_of(base, cut, num_rows=60, num_epochs=2), lambda _: None)
    assert "--resume" in caught.value.hint
    with pytest.raises(UsageError, match="had another configuration") as caught:
        qlora.train(request_of(base, cut, num_rows=60, num_epochs=2, lora_r=2, resume=True), lambda _: None)
    with trainer_process(base, cut, "--resume") as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 2, errors  # config.json has lora_r 2 by now
    request_of(base, cut, num_rows=60, num_epochs=2)
    with trainer_process(base, cut, "--resume") as process:
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert Path(output.strip()) == cut / "out" / "tiny-v1"
    assert losses_of(cut / "out" / "tiny-v1") == pytest.approx(expected, abs=1e-6, rel=0)
    one, other = (json.loads((folder / "out" / "tiny-v1" / "manifest.json").read_text()) for folder in (whole, cut))
    assert one["held_out"] == pytest.approx(other["held_out"], abs=1e-6)
    assert [path.name for path in (cut / "out").iterdir()] == ["tiny-v1"]


def test_a_stopped_run_saves_at_its_step_and_goes_on_from_there(base: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    expected = losses_of(qlora.train(request_of(base, whole), lambda _: None))

    def stop_at_three(progress: qlora_run.Progress) -> None:
        if progress.step == 3 and progress.state == "training" and not progress.message:
            os.kill(os.getpid(), 15)

    with pytest.raises(CancelledError, match="stopped after step 3"):
        qlora.train(request_of(base, cut), stop_at_three)
    assert qlora_run.runs(cut / "out")[0]["state"] == "cut off"
    adapter = qlora.train(request_of(base, cut, resume=True), lambda _: None)
    assert losses_of(adapter) == pytest.approx(expected, abs=1e-6, rel=0)
    assert json.loads((adapter / "manifest.json").read_text())["resumed_at_step"] == 3


@pytest.mark.slow
def test_two_processes_that_share_the_rows_have_the_losses_of_one(base: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
    alone = qlora.train(request_of(base, one, lora_dropout=0.0), lambda _: None)
    told: list[qlora_run.Progress] = []
    shared = qlora.train(request_of(base, two, lora_dropout=0.0, num_gpus=2), told.append)
    assert losses_of(shared)[:4] == pytest.approx(losses_of(alone)[:4], abs=1e-5)
    assert told[-1].state == "done"
    assert sorted(path.name for path in shared.iterdir()) == sorted(path.name for path in alone.iterdir())
    assert json.loads((shared / "manifest.json").read_text())["num_gpus"] == 2


@pytest.mark.long
def test_processes_end_with_the_command_that_started_them(base: Path, tmp_path: Path) -> None:
    import psutil

    request_of(base, tmp_path, num_epochs=100)
    with trainer_process(base, tmp_path, "--num-gpus", "2") as process:
        wait_for_a_step(process)
        workers = [
            one
            for one in psutil.process_iter(["cmdline"])
            if str(tmp_path / "out") in " ".join(one.info["cmdline"] or ())
        ]
        assert len(workers) >= 2
        process.kill()
        process.wait()
        _, alive = psutil.wait_procs([one for one in workers if one.pid != process.pid], timeout=60)
        assert not alive
    request_of(base, tmp_path, num_epochs=100)
    with trainer_process(base, tmp_path, "--num-gpus", "2", "--resume") as process:
        wait_for_a_step(process)
        process.terminate()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1, errors
        assert "tiny-v1 was stopped after step" in errors


def wait_for_a_step(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    said: list[str] = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("training") and "loss" in line:
            return
    raise AssertionError("".join(said))


def test_two_processes_cannot_train_the_same_adapter(base: Path, tmp_path: Path) -> None:
    request = request_of(base, tmp_path)
    run = qlora_run.open_run(request.out, "tiny", {})
    with pytest.raises(EnvironmentFault, match="Another process trains tiny-v1"):
        qlora.train(request, lambda _: None)
    run.close()
    qlora.train(request, lambda _: None)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_too_few_examples_are_refused_unless_one_insists(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"7 examples are too few .* at least 30 are needed") as caught:
        qlora.train(request_of(base, tmp_path, num_rows=7), lambda _: None)
    assert "--force" in caught.value.hint
    assert not (tmp_path / "out").exists()
    qlora.train(request_of(base, tmp_path, num_rows=7, force=True), lambda _: None)


def test_what_does_not_fit_into_memory_is_refused_with_what_to_change(base: Path, tmp_path: Path) -> None:
    shapes = read_shapes(base, ("q_proj",))
    config = read_config(write_config(tmp_path / "c.json", row_tokens=65536, rows_at_once=4, rows_per_step=4))
    needed = needed_bytes(shapes, config, "cpu", "none")["total"]
    assert check_memory(shapes, config, "cpu", "none", needed) == needed
    with pytest.raises(ModelError, match=r"takes about .* GB on cpu") as caught:
        check_memory(shapes, config, "cpu", "none", needed - 1)
    assert '"rows_at_once": 1' in caught.value.hint
    assert caught.value.details["needed_bytes"] == needed
    with pytest.raises(ModelError) as caught:
        check_memory(shapes, config, "cpu", "none", 1000)
    assert "smaller model" in caught.value.hint


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    damaged = make_base(tmp_path / "damaged")
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match=r"The loss is nan at step 1") as caught:
        qlora.train(request_of(damaged, tmp_path, packing=False), lambda _: None)
    assert "learning_rate" in caught.value.hint
    assert not (tmp_path / "out" / "tiny-v1").exists()
    assert qlora_run.runs(tmp_path / "out")[0]["progress"]["state"] == "failed"


def test_a_missing_package_gives_the_command_that_installs_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name in ("trl", "datasets") else find(name, *rest)
    )
    with pytest.raises(EnvironmentFault, match="not installed") as caught:
        qlora.train(request_of(base, tmp_path), lambda _: None)
    assert caught.value.hint == f'{sys.executable} -m pip install "trl>=1.14,<2" "datasets>=4.7"'


def test_another_gpu_than_the_first_is_refused_with_the_way_to_take_it(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes the first GPU, not cuda:1") as caught:
        qlora.plan_job(replace(request_of(base, tmp_path), device="cuda:1"))
    assert "CUDA_VISIBLE_DEVICES=1 planpatch train qlora" in caught.value.hint


def test_one_of_several_processes_takes_its_own_gpu(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(qlora, "choose_device", lambda wanted: wanted)
    second = replace(request_of(base, tmp_path), device="cuda:1")
    assert qlora._device_of(second) == "cuda:1"
    with pytest.raises(UsageError, match="takes the first GPU, not cuda:2"):
        qlora.plan_job(replace(second, device="cuda:2"))


def test_rows_that_gpus_cannot_share_are_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows_per_step is 2, which 4 GPUs cannot share"):
        qlora.train(request_of(base, tmp_path, num_gpus=4), lambda _: None)
