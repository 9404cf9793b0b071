"""Where in the user's script something happened, for messages about it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

_NOT_SCRIPTS = (str(Path(__file__).resolve().parents[1]), str(Path(torch.__file__).parent), "<")


def script_line() -> str:
    """The innermost line that runs and is neither of this package nor of torch, as ``train.py:12``."""
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_NOT_SCRIPTS):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
