"""The recorded edits of `planpatch bench engine`, and what is reckoned from llama.cpp's own program."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path

import pytest

from engine.errors import EnvironmentFault, PathError, UsageError
from lsp_server.bench_engine import measure_llama_cpp, measure_llama_lookup
from lsp_server.bench_workload import Recording, Workload, read_workload

pytestmark = pytest.mark.unit


def test_what_comes_with_planpatch_has_prompts_and_answers_of_one_tokenizer() -> None:
    workload = read_workload()
    references = workload.of("references")
    assert len(references) == 108
    for one in workload.recordings:
        assert len(one.prompt) > 30
        assert 3 < len(one.answer) < 4000
        assert max(*one.prompt, *one.answer) < 151_936


def test_some_of_a_workload_are_spread_over_all_of_it() -> None:
    rows = tuple(Recording(str(number), "references", (1,), (2,)) for number in range(10))
    workload = Workload((*rows, Recording("x", "answers", (1,), (2,))), {}, {})
    assert [one.id for one in workload.of("references", 4)] == ["0", "2", "5", "7"]
    assert [one.id for one in workload.of("references", 99)] == [str(number) for number in range(10)]
    assert [one.id for one in workload.of("answers")] == ["x"]


def workload_file(**changes: object) -> bytes:
    """With one row that has something else than it should; without changes there is no row."""
    row = {"id": "a", "workload": "references", "prompt": [1] * 3000, "answer": [1], **changes}
    lines = ['{"left_out": {}, "made_with": {}}', *([json.dumps(row)] if changes else [])]
    return gzip.compress("\n".join(lines).encode())


def test_a_file_with_enough_is_read(tmp_path: Path) -> None:
    file = tmp_path / "w.jsonl.gz"
    file.write_bytes(workload_file(id="b"))
    assert [one.id for one in read_workload(file).recordings] == ["b"]


@pytest.mark.parametrize(
    "content",
    [
        b"no gzip",
        gzip.compress(b"no json"),
        gzip.compress(b"[]\n"),
        gzip.compress(b'{"left_out": {}, "made_with": {}}\n{"id": 1}\n'),
        gzip.compress(b'{"left_out": {}}\n')[:-9],
        workload_file(),
        workload_file(prompt=7),
        workload_file(prompt=["1"] * 3000),
        workload_file(answer=[]),
        workload_file(answer=[-1]),
        workload_file(workload="others"),
        workload_file(prompt=[1] * 20),
    ],
)
def test_another_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "w.jsonl.gz"
    file.write_bytes(content)
    with pytest.raises(UsageError, match="is no recorded workload"):
        read_workload(file)
    with pytest.raises(PathError, match="cannot be read"):
        read_workload(tmp_path / "none")


def llama_bench(folder: Path, script: str) -> Path:
    program = folder / "llama-bench"
    program.write_text(f"#!{sys.executable}\n{script}")
    program.chmod(0o700)
    return program


WORKLOAD = Workload((Recording("a", "references", (1,), tuple(range(101))),), {}, {})


@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")
def test_llama_bench_s_rates_become_times(tmp_path: Path) -> None:
    rate = "import json, sys; print(json.dumps([{'avg_ts': 90.0 if '900' in sys.argv[4] else 10.0}]))"
    figures = measure_llama_cpp(llama_bench(tmp_path, rate), tmp_path / "m.gguf", WORKLOAD.recordings, 2, on_gpu=False)
    assert figures.prefill_ms == pytest.approx(10_000)
    assert figures.decode_ms == {"1": pytest.approx(100)}
    assert figures.plan_p50_ms == pytest.approx(10_000 + 1_500)
    assert figures.patch_p50_ms == pytest.approx(10_000 + 12 / 90 * 1000, rel=1e-3)
    json.dumps(figures.to_json())


@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")
def test_a_llama_bench_that_fails_is_told_with_its_own_words(tmp_path: Path) -> None:
    program = llama_bench(tmp_path, "import sys; sys.exit('no such model')")
    with pytest.raises(EnvironmentFault, match="no such model"):
        measure_llama_cpp(program, tmp_path / "m.gguf", WORKLOAD.recordings, 2, on_gpu=False)
    with pytest.raises(EnvironmentFault, match="failed"):
        measure_llama_cpp(tmp_path / "none", tmp_path / "m.gguf", WORKLOAD.recordings, 2, on_gpu=False)


@pytest.mark.skipif(sys.platform == "win32", reason="a script is no program there")
def test_llama_cpp_s_own_lookup_is_given_each_prompt_and_its_rates_are_added_up(tmp_path: Path) -> None:
    script = (
        "import pathlib, sys; text = pathlib.Path(sys.argv[4]).read_text(encoding='utf-8'); n = int(sys.argv[6])\n"
        "print(f'{text}\\ndecoded {n:4d} tokens in {len(text) / 2:8.3f} seconds, speed: 1 t/s')"
    )
    edits = [
        (Recording("a", "references", (1,), tuple(range(30))), "🙂é"),
        (Recording("b", "references", (1,), tuple(range(12))), "four"),
    ]
    figures = measure_llama_lookup(llama_bench(tmp_path, script), tmp_path / "m.gguf", edits, 2, on_gpu=False)
    assert figures.workloads == {"references": {"edits": 2, "tokens": 42, "tok_per_s": pytest.approx(14)}}
    assert figures.patch_tok_per_s == pytest.approx(14)
    with pytest.raises(EnvironmentFault, match="said no rate"):
        measure_llama_lookup(llama_bench(tmp_path, "print(1)"), tmp_path / "m.gguf", edits, 2, on_gpu=False)
