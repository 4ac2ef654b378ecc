"""The two long jobs of a pull, run in a process of their own: `convert` a GGUF file, `download` from the hub.

Run by path with `python -I`, so it imports nothing of PlanPatch. Events go as JSON lines to a file; when standard input
closes, the parent is gone and the worker ends at once.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Report = Callable[..., None]


def convert(report: Report, gguf_file: str, folder: str) -> None:
    """Write a GGUF file's weights as bf16 safetensors, with its config and tokenizer.

    Args:
        report: Takes events: `total_bytes` of the result once known, then `done_bytes`.
        gguf_file: The GGUF file.
        folder: Where to write; must exist.
    """
    warnings.simplefilter("ignore")
    _read_gguf_once(report)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    modeling_gguf_pytorch_utils.tqdm = functools.partial(_watched, report)  # type: ignore[assignment]
    parent, name = os.path.split(gguf_file)
    tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=name)
    model = AutoModelForCausalLM.from_pretrained(
        parent, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def download(report: Report, repository: str, revision: str, folder: str, *names: str) -> None:
    """Fetch files of a hub repository.

    Args:
        report: Not needed: the parent watches the folder.
        repository: Hub id.
        revision: Commit.
        folder: Where to write; what is there already is not fetched again.
        names: File names.
    """
    from huggingface_hub import snapshot_download

    snapshot_download(repository, revision=revision, local_dir=folder, allow_patterns=list(names))


def _read_gguf_once(report: Report) -> None:
    """Let a file's metadata be read once: transformers reads it three times, most of the conversion's time."""
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._bytes

        @data.setter
        def data(self, mapped: Any) -> None:
            # Slices of a plain array are made three times faster than those of numpy's memmap.
            self._bytes = np.asarray(mapped)

    @functools.lru_cache(maxsize=1)
    def read(path: str) -> Reader:
        reader = Reader(path)
        report(total_bytes=sum(2 * int(tensor.n_elements) for tensor in reader.tensors))
        return reader

    gguf.GGUFReader = lambda path, mode="r": read(os.fspath(path))  # type: ignore[assignment,misc]


def _watched(report: Report, tensors: Iterable[Any], **_: Any) -> Iterator[Any]:
    done_bytes = 0
    for tensor in tensors:
        yield tensor
        done_bytes += 2 * int(tensor.n_elements)
        report(done_bytes=done_bytes)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin: its lock would be held when Python ends
        pass
    os._exit(3)


def main(events_path: str, job: str, *arguments: str) -> int:
    """Do a job.

    Args:
        events_path: File for events.
        job: `convert` or `download`.
        arguments: The job's own.

    Returns:
        0, or 1 after an `error` event.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(events_path, "a", encoding="utf-8") as events:

        def report(**event: Any) -> None:
            events.write(json.dumps(event) + "\n")
            events.flush()

        try:
            {"convert": convert, "download": download}[job](report, *arguments)
        except Exception as error:  # every failure is the parent's to explain
            report(error=f"{type(error).__name__}: {error}", errno=getattr(error, "errno", None))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
