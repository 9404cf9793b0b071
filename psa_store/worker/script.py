"""What a script gives, checked, and where in it something happened, for messages about it."""

from __future__ import annotations

import contextlib
import operator
import sys
from pathlib import Path

import torch
from torch import nn

from psa_store.errors import UsageError

_NOT_SCRIPTS = (str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).parent), contextlib.__file__, "<")


def script_line() -> str:
    """The innermost line that runs and is neither of this package nor of torch, as ``train.py:12``."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_SCRIPTS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def check_model(model: object) -> None:
    """Raise UsageError if it is no module whose parameters can be found by name."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"model: a {type(model).__name__}; give an nn.Module, not a function, and before torch.jit makes one of it"
        )


def whole_number(name: str, value: object, low: int | None = None) -> int:
    """Return it as an int, also one of numpy; raises UsageError, naming it, if it is none or less than ``low``."""
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UsageError(f"{name}={value!r}: must be a whole number") from None
    if low is not None and number < low:
        raise UsageError(f"{name}={value!r}: must be at least {low}")
    return number
