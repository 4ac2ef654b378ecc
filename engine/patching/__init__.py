"""Source text and an intent in, a plan and a proved patch out. Knows nothing of editors or HTTP."""
