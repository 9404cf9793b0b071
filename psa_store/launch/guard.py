"""Processes that end when their parent ends, however that ends."""

from __future__ import annotations

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1
SAFE_PATH = "psa"
"""Value of PYTHONSAFEPATH by which a process knows that we have set it."""


def die_with_parent(number: signal.Signals) -> None:
    """Have the kernel send this process a signal when the one that started it is gone (Linux; elsewhere nothing).

    More precisely: when the *thread* that started it is gone, from now on. Look afterwards whether it still is there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number)
