"""psa_store: a fault-tolerant parameter server for PyTorch.

Parameters live as versioned shards in Redis; ZooKeeper knows which processes are alive, and holds the plan. ::

    import psa_store as psa

    with psa.Worker("demo", model, optimizer=psa.optim.AdamW(lr=1e-3), steps=1000) as worker:
        for batch in worker.batches(dataset, batch_size=32):
            model.loss(batch).backward()
            worker.step()

The names below are loaded when they are first used, so that programs that need only some (the CLI) start quickly.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from psa_store import errors, optim
    from psa_store.job.average import ema
    from psa_store.store import Store
    from psa_store.worker import Worker
    from psa_store.worker.split import split

    __version__: str

__all__ = ["Store", "Worker", "ema", "errors", "optim", "split"]

_HOMES = {
    "Store": "psa_store.store",
    "Worker": "psa_store.worker",
    "ema": "psa_store.job.average",
    "split": "psa_store.worker.split",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name == "__version__":
        return import_module("importlib.metadata").version("psa-store")
    if name in __all__:
        return import_module(f"psa_store.{name}")
    raise AttributeError(f"module 'psa_store' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
