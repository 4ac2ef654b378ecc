"""Steps of the CUDA path on Qwen3-8B's shapes with random weights: decode by rows and context, prefill, memory.

    python benchmarks/cuda_step.py [--quantization int8|nf4|bf16] [--tuning FILE [--tune]] [--quick]

Prints one table; the last line is JSON. Bandwidth is what a step must read once (weights as stored, keys and values)
over its time, as a share of a copy measured in the same run (bytes read plus written). Not measured: sampling, text,
scheduling.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# ruff: noqa: E402
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.inference.loading import set_runtime_defaults

set_runtime_defaults()

import torch

from engine.inference.cuda.paged_kv import PagedKV
from engine.inference.cuda.runner import CudaRunner
from engine.inference.random_model import qwen3_8b, random_model


def milliseconds(run: Callable[[], object], *, repeats: int = 20) -> float:
    """Median time of `run` on the device and the host together, after three runs that do not count."""
    for _ in range(3):
        run()
    times: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        started_at = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started_at) * 1000)
    return statistics.median(times)


def copy_gb_per_s() -> float:
    """Bandwidth of a device-to-device copy of 2 GiB, 10⁹ bytes read and written a second."""
    source = torch.randint(0, 255, (2 << 30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    time_ms = milliseconds(lambda: target.copy_(source))
    return 2 * source.numel() / time_ms / 1e6


class Bench:
    """One model and what is asked of it."""

    def __init__(self, runner: CudaRunner, copy_rate: float) -> None:
        self.runner = runner
        self.copy_rate = copy_rate
        self.weight_bytes = runner.num_weight_bytes
        self.rows: list[tuple[str, float, float]] = []

    def filled(self, num_tokens: int) -> PagedKV:
        """A sequence of so many tokens."""
        kv = self.runner.new_kv()
        ids = [(7 * index) % 1000 for index in range(num_tokens)]
        for start in range(0, num_tokens, self.runner.chunk_tokens):
            self.runner.prefill(kv, ids[start : start + self.runner.chunk_tokens], want_logits=False)
        return kv

    def decode(self, name: str, rows: list[tuple[PagedKV, int]]) -> float:
        """Time of one step; the caches go back after each."""
        lengths = [kv.num_tokens for kv, _ in rows]

        def run() -> None:
            self.runner.decode([(kv, range(100, 100 + count)) for kv, count in rows])
            for (kv, _), length in zip(rows, lengths, strict=True):
                kv.truncate(length)

        time_ms = milliseconds(run)
        num_bytes = self.weight_bytes + sum(lengths) * self.runner.num_kv_bytes_of_a_token
        self.add(name, time_ms, num_bytes)
        return time_ms

    def add(self, name: str, time_ms: float, num_bytes: float) -> None:
        """Keep and print one line."""
        share = num_bytes / time_ms / 1e6 / self.copy_rate
        self.rows.append((name, time_ms, share))
        print(f"{name:52s} {time_ms:8.3f} ms  {share:6.1%}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quantization", default="int8", choices=["int8", "nf4", "bf16"])
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--tuning", type=Path)
    parser.add_argument("--tune", action="store_true", help="measure tiles that the file lacks")
    parser.add_argument("--kv-tokens", type=int, default=4096)
    parser.add_argument("--quick", action="store_true", help="one context, few widths")
    options = parser.parse_args()
    device = torch.cuda.get_device_name()
    copy_rate = copy_gb_per_s()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    config = qwen3_8b()
    config.num_hidden_layers = options.layers
    dtype = torch.bfloat16 if options.quantization == "bf16" else torch.float16
    loaded = random_model(config, options.quantization, dtype)
    loaded_bytes = torch.cuda.max_memory_reserved()
    runner = CudaRunner(loaded, num_kv_tokens=options.kv_tokens, tuning_path=options.tuning)
    started_at = time.perf_counter()
    runner.warm_up(tune=options.tune)
    warm_up_s = time.perf_counter() - started_at
    bench = Bench(runner, copy_rate)
    print(f"{device}, {options.quantization}, copy {copy_rate:.0f} GB/s, warm-up {warm_up_s:.1f} s", flush=True)

    context = min(1024, options.kv_tokens // 2)
    kv = bench.filled(context)
    decode_ms = {
        str(width): bench.decode(f"decode, {width} rows of one sequence, {context} tokens", [(kv, width)])
        for width in ((1, 16) if options.quick else (1, 2, 4, 8, 16, 32, 64))
    }
    prefill_ms: dict[str, float] = {}
    for num_tokens in (900,) if options.quick else (100, 300, 900, 2048):

        def prefill(num_tokens: int = num_tokens) -> None:
            new = runner.new_kv()
            runner.prefill(new, [index % 1000 for index in range(num_tokens)], want_logits=True)
            new.release()

        prefill_ms[str(num_tokens)] = milliseconds(prefill, repeats=5)
        print(f"prefill, {num_tokens} tokens {prefill_ms[str(num_tokens)]:.1f} ms", flush=True)
    peak = torch.cuda.max_memory_reserved()
    kernel_us = runner.time_kernels()
    for name, (us, num_bytes) in kernel_us.items():
        bench.add(f"kernel {name}", us / 1000, num_bytes)
    kv.release()
    contexts_ms: dict[str, float] = {}
    separate_ms: dict[str, float] = {}
    if not options.quick:
        for width in (2, 4, 8, 16):
            if width * context < options.kv_tokens:
                forks = [bench.filled(context) for _ in range(width)]
                separate_ms[str(width)] = bench.decode(
                    f"decode, {width} sequences of {context}", [(one, 1) for one in forks]
                )
                for one in forks:
                    one.release()
        for length in (256, 512, 1024, 2048, 4096, 8192):
            if length + 16 <= options.kv_tokens:
                kv = bench.filled(length)
                contexts_ms[str(length)] = bench.decode(f"decode, 1 row, context {length}", [(kv, 1)])
                bench.decode(f"decode, 16 rows of one sequence, context {length}", [(kv, 16)])
                kv.release()
    print(
        f"peak reserved {peak / 1e9:.2f} GB (load {loaded_bytes / 1e9:.2f}), "
        f"16 rows / 1 row {decode_ms['16'] / decode_ms['1']:.3f}, one row {1000 / decode_ms['1']:.0f} tok/s"
    )
    print(
        json.dumps(
            {
                "device": device,
                "quantization": options.quantization,
                "copy_gb_per_s": round(copy_rate),
                "decode_ms": decode_ms,
                "separate_ms": separate_ms,
                "contexts_ms": contexts_ms,
                "prefill_ms": prefill_ms,
                "kernel_us": {name: us for name, (us, _) in kernel_us.items()},
                "peak_reserved_gb": peak / 1e9,
            }
        )
    )


if __name__ == "__main__":
    main()
