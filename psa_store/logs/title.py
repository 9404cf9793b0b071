"""What `ps` and `top` call a process: ``psa: worker 1 of job gpt``. Only processes that psa starts are named."""

from __future__ import annotations

import os

_ENVIRONMENT_STAYS = "SPT_NOENV"
"""Tells setproctitle to leave alone what /proc/PID/environ shows."""

_what: str | None = None


def entitle(what: str) -> None:
    """Name this process, for example ``worker 1``."""
    global _what
    _what = what
    _set(f"psa: {what}")


def entitle_with_job(job: str) -> None:
    """Add the job, once it is known; a process that was not named keeps its own name."""
    if _what is not None:
        _set(f"psa: {_what} of job {job}")


def _set(title: str) -> None:
    try:
        from setproctitle import setproctitle  # here: most commands live too briefly for a title
    except ModuleNotFoundError:
        return  # a checkout that was updated, and not installed again, trains as well
    os.environ.setdefault(_ENVIRONMENT_STAYS, "1")
    setproctitle(title)
