"""The command line, `psa`. Errors end it without a traceback, with the exit code that ``errors`` documents."""

from psa_store.cli.app import main

__all__ = ["main"]
