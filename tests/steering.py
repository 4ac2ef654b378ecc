"""What the environment asks of a test run, read before the run removes it from what PlanPatch would see."""

from __future__ import annotations

import os

BENCH = os.environ.get("PLANPATCH_BENCH", "")
BENCH_PYTHON = os.environ.get("PLANPATCH_BENCH_PYTHON", "")
BENCH_RESULTS = os.environ.get("PLANPATCH_BENCH_RESULTS", "")
TEST_MODEL = os.environ.get("PLANPATCH_TEST_MODEL", "")
LSP_DEVICE = os.environ.get("PLANPATCH_LSP_DEVICE", "")
CHROMIUM = os.environ.get("PLANPATCH_CHROMIUM", "")
NVIM = os.environ.get("PLANPATCH_NVIM", "")
LLAMA_BENCH = os.environ.get("PLANPATCH_LLAMA_BENCH", "")
LLAMA_GGUF = os.environ.get("PLANPATCH_LLAMA_GGUF", "")
PICTURES = os.environ.get("PLANPATCH_PICTURES", "")
