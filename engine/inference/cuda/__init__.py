"""The fast path on one CUDA device. Importing this package loads neither torch nor Triton."""
