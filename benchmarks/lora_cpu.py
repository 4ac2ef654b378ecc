"""What the adapter that ships costs on a CPU: the 0.5B with it and without it, in turn; and as peft has its layers.

    python benchmarks/lora_cpu.py [--peft]

Needs the model (`planpatch models pull qwen2.5-coder-0.5b-instruct`). Prints a line of JSON for each request: seconds
to the first token of a new prompt, and seconds a token after it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference import cpu
from engine.inference.catalogue import catalogue
from engine.inference.protocol import Completion, Engine, GenerationRequest, Message, SamplingParams
from lsp_server.cli_options import open_engine, open_session

MODEL = "qwen2.5-coder-0.5b-instruct"
ROUNDS, TOKENS = 4, 64


def main() -> None:
    """Measure in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft", action="store_true", help="leave its layers as they are")
    if parser.parse_args().peft:
        cpu.shorten_lora = lambda *_: None
    adapter = catalogue()[MODEL].adapter
    assert adapter is not None
    session = open_session({"model": MODEL, "adapter": "__none__", "device": "cpu"}, None, False)
    with open_engine(session, False) as engine:
        for number in range(ROUNDS):
            for name in ("__none__", str(adapter.path)):
                print(json.dumps({"adapter": Path(name).name, **measure(engine, name, number)}), flush=True)


def measure(engine: Engine, adapter: str, number: int) -> dict[str, float]:
    """One request whose prompt no other shares."""
    text = f"{number} Write a Python function that parses an ISO date. " * 60
    ids = tuple(engine.tokenizer.encode_chat([Message("user", text)]))
    started_at, first_at = time.monotonic(), 0.0
    for event in engine.stream(engine.submit(GenerationRequest(ids, SamplingParams(TOKENS), adapter=adapter))):
        first_at = first_at or time.monotonic()
        if isinstance(event, Completion):
            a_token = (time.monotonic() - first_at) / max(1, len(event.token_ids) - 1)
            return {"prompt_tokens": len(ids), "first_s": round(first_at - started_at, 2), "token_s": round(a_token, 4)}
    raise AssertionError("a stream ends with a Completion")


if __name__ == "__main__":
    main()
