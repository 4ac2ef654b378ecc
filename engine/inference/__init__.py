"""Token ids in, token ids out. Knows nothing of Python source, editors or HTTP."""
