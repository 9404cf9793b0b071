"""The command line, `psa`. Errors end it without a traceback, with the exit code that ``errors`` documents."""

from __future__ import annotations


def main() -> None:
    """Run the command that was typed."""
    from psa_store.cli.app import main as run  # here: __main__ looks after the path first

    run()
