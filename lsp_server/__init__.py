"""Every surface of the process: the command line now, LSP and HTTP beside it."""
