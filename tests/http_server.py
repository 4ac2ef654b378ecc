"""HTTP for tests: `planpatch serve` with the real 0.5B in a process of its own, or the listener with a scripted model.

with serve_05b(test_home, folder) as url: ...                              the real one
with listen(ScriptedChat(["Hello"], folder), folder) as url: ...           the scripted one, in this process
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer

from engine.errors import CancelledError
from engine.inference.protocol import Completion, Event, Token, TokenLogprob
from engine.inference.store import LocalModel
from engine.inference.tokenizer import Detokenizer, HFChatTokenizer
from lsp_server.http.listener import Listener, bind
from lsp_server.http.service import Service
from lsp_server.model_host import HostStatus
from lsp_server.paths import Paths
from lsp_server.session import Session
from lsp_server.settings import Settings
from tests.homes import make_home
from tests.scripted_engine import Script, ScriptedEngine
from tests.tiny_model import tiny_model_files, write_files

MODEL = "qwen2.5-coder-0.5b-instruct"
SCRIPTED = "scripted"
TOOLS_TEMPLATE = (
    "{% if enable_thinking %}{% endif %}"
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


# --- the real model --------------------------------------------------------------------------------------------------


@contextmanager
def serve_05b(test_home: Path, folder: Path, *options: str) -> Iterator[str]:
    """`planpatch serve` on a free port.

    Args:
        test_home: Where the models are.
        folder: Where a fresh home is made.
        *options: More options.

    Yields:
        Its URL; the model may still be loading.
    """
    home = make_home(folder / "planpatch home", test_home)
    command = [sys.executable, "-I", "-X", "utf8", "-m", "lsp_server", "serve", "--port", "0", "--json"]
    model = ["--model", MODEL, "--device", "cpu", "--quantization", "bf16"]
    environ = {**os.environ, "PLANPATCH_HOME": str(home), "PLANPATCH_CONFIG": str(home / "planpatch.toml")}
    with (
        (folder / "stderr.txt").open("w+", encoding="utf-8") as said,
        subprocess.Popen(
            [*command, *model, *options], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, env=environ
        ) as process,
    ):
        try:
            assert process.stdout is not None
            lines = b""
            while not lines.rstrip().endswith(b"}"):
                lines += (line := process.stdout.readline())
                assert line, (folder / "stderr.txt").read_text(encoding="utf-8")
            yield json.loads(lines)["url"]
        finally:
            process.terminate()
            process.wait(30)
    assert "Traceback" not in (folder / "stderr.txt").read_text(encoding="utf-8")


# --- a scripted model ------------------------------------------------------------------------------------------------


class ScriptedChat(ScriptedEngine):
    """A `ScriptedEngine` with a real tokenizer, one event for each token, log-probabilities and embeddings.

    Args:
        script: The answers.
        folder: Where the model's folder is made; it has tools and thinking, and can fill in the middle.
        context_length: Most tokens of prompt and answer.
    """

    def __init__(self, script: Script, folder: Path, *, context_length: int = 1_000_000) -> None:
        super().__init__(script, context_length=context_length)
        files = tiny_model_files()
        tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
        tokenizer.add_special_tokens(["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"])
        files["tokenizer.json"] = tokenizer.to_str().encode()
        settings = {"eos_token": "<|im_end|>", "chat_template": TOOLS_TEMPLATE}
        files["tokenizer_config.json"] = json.dumps(settings).encode()
        self.folder = write_files(folder / SCRIPTED, files)
        self._tokenizer = cast(Any, HFChatTokenizer(self.folder))

    @property
    def local(self) -> LocalModel:
        return LocalModel(SCRIPTED, self.folder, "ab" * 32, "", "", 1000, "folder")

    def stream(self, request_id: str) -> Iterator[Event]:
        request = self.requests[int(request_id[1:])]
        tokenizer = cast(HFChatTokenizer, self._tokenizer)
        for event in super().stream(request_id):
            if isinstance(event, Completion):
                vector = (3.0, 4.0, 12.0) if request.embed else ()
                yield replace(event, embedding=vector, top_logprobs=())
                return
            texts = Detokenizer(tokenizer)
            for token_id in event.token_ids:
                top = tuple(TokenLogprob(one, -0.5 - one) for one in (token_id, 2))[: request.params.top_logprobs]
                yield Token((token_id,), texts.push([token_id]), -0.5 if top else None, top)


class ScriptedHost:
    """A model's host that is ready at once, or once `loaded` is set."""

    def __init__(self, engine: ScriptedChat, loaded: threading.Event | None = None) -> None:
        self._engine = engine
        self._loaded = loaded
        self.local_or_none = engine.local

    @property
    def status(self) -> HostStatus:
        return HostStatus("ready" if self.engine_or_none else "loading", SCRIPTED)

    @property
    def engine_or_none(self) -> ScriptedChat | None:
        return self._engine if self._loaded is None or self._loaded.is_set() else None

    def wait(self, is_cancelled: threading.Event) -> ScriptedChat:
        while self._loaded is not None and not self._loaded.wait(0.01):
            if is_cancelled.is_set():
                raise CancelledError("Cancelled while the model was loading")
        return self._engine


@contextmanager
def listen(
    engine: ScriptedChat, folder: Path, *, loaded: threading.Event | None = None, **settings: Any
) -> Iterator[str]:
    """The listener in this process.

    Args:
        engine: The model.
        folder: A home.
        loaded: Says that the model is loaded; None: it is.
        **settings: Settings.

    Yields:
        Its URL.
    """
    session = Session(Paths(folder, folder / "planpatch.toml"), Settings(**settings), [])
    service = Service(cast(Any, ScriptedHost(engine, loaded)), lambda: session, cast(Any, None), "t0ken")
    runtime_file = folder / "runtime.json"
    listener = Listener(service, bind("127.0.0.1", 0, has_token=False, runtime_file=runtime_file), runtime_file)
    listener.start()
    try:
        yield listener.address.url
    finally:
        listener.close()


# --- a plain client --------------------------------------------------------------------------------------------------


def call(url: str, body: Any = None, headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """Status and JSON of one request; a POST where there is a body."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=120) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def events(url: str, body: Any) -> Sequence[str]:
    """The data of each server-sent event, as text; the stream is as OpenAI writes it."""
    request = urllib.request.Request(url, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as response:
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        text = response.read().decode("ascii")
    assert text.endswith("\n\n")
    found = text[:-2].split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in found)
    return [event.removeprefix("data: ") for event in found]
