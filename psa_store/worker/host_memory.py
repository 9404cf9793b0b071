"""Memory of this process: given back when a stage goes, and what is said when it is too little."""

from __future__ import annotations

import ctypes
import errno
import gc
import resource
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from psa_store.errors import OutOfMemory
from psa_store.observe.formatting import size
from psa_store.worker.script import script_line

_LIMITS = {"data segment, ulimit -d": resource.RLIMIT_DATA, "address space, ulimit -v": resource.RLIMIT_AS}
_TORCH_SAYS = "can't allocate memory"


def give_back(gone: weakref.ref[nn.Module] | None = None) -> None:
    """Give to the system what nothing uses any more: malloc keeps tensors of some megabytes for later ones.

    ``gone``: a module that nothing should use. If it is there still, it has a cycle, and all of them are looked for: a
    tenth of a second of processor time.
    """
    if gone is not None and gone() is not None:
        gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@contextmanager
def must_suffice(what: str, parameter_bytes: int) -> Iterator[None]:
    """Say in words what did not fit. ``what``: to do inside, with a verb; ``parameter_bytes``: of the parameters in it.

    Raises:
        OutOfMemory: in place of what Python and torch raise where memory is wanted.
    """
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:
        if isinstance(error, OutOfMemory) or not _is_lack(error):
            raise
        soft = {name: resource.getrlimit(each)[0] for name, each in _LIMITS.items()}
        limits = [f"{size(limit)} ({name})" for name, limit in soft.items() if limit != resource.RLIM_INFINITY]
        raise OutOfMemory(
            f"{script_line()}: not enough memory to {what}, {size(parameter_bytes)} of parameters and buffers"
            f"{', under the limit of ' + ' and '.join(limits) if limits else ''}. Beside them a worker has their "
            "gradients and what the passes keep. Cut the model into more stages (psa.Worker(stages=[…]), psa.split) "
            "with a worker for each, or have fewer of them in memory at once (resident_stages=1), or give each worker "
            "more memory"
        ) from error


def _is_lack(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or _TORCH_SAYS in str(error)


@cache
def _trim() -> Any:
    """malloc's own; None where there is none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
