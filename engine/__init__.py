"""The model (`engine.inference`) and the edits made with it (`engine.patching`)."""
