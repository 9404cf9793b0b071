"""The seq2seq example in a worker that says each of its steps, and lets the last ones wait for a file of a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psa_store as psa
from chaos.train import await_end
from psa_store.examples import seq2seq


class HeldWorker(psa.Worker):
    """``go``: the file, if there is one to wait for."""

    go: Path | None = None

    def batches(self, *arguments: Any, **options: Any) -> Iterator[Any]:
        for batch in super().batches(*arguments, **options):
            if self.is_main:
                print(f"step {self.version}", flush=True)
            assert self.steps is not None
            await_end(self, self.steps, self.go)
            yield batch


if __name__ == "__main__":
    arguments = sys.argv[1:]
    if "--end-after" in arguments:
        place = arguments.index("--end-after")
        HeldWorker.go = Path(arguments[place + 1])
        del arguments[place : place + 2]
    psa.Worker = HeldWorker  # type: ignore[misc]
    seq2seq.train(seq2seq.parse_options(arguments))
