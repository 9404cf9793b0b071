"""How updates and ranks wait for each other: the mode of a job, as data that is fixed when the job is created.

* ``sync``: a step is applied when the gradients of all ranks are in, so the result has the same bits whatever happens.
* ``async``: each push is applied when it arrives, and nobody waits for anybody.
* ``ssp:staleness=s``: the same, but no rank starts a step while another is more than ``s`` steps behind it (stale
  synchronous parallel; Ho et al., NIPS 2013). With ``s=0`` nobody could be ahead: that *is* ``sync``.

Pure: no I/O, no threads, no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from psa_store.errors import UsageError

_STALENESS_MAX = 1 << 20
_KNOWN = "sync, async, or ssp:staleness=2"


class ModeName(StrEnum):
    SYNC = "sync"
    ASYNC = "async"
    SSP = "ssp"


@dataclass(frozen=True, slots=True)
class Mode:
    """Use :func:`parse_mode`. ``str()`` gives the text back that it was read from."""

    name: ModeName = ModeName.SYNC
    staleness: int = 0
    """SSP: by how many steps a rank may be ahead of the slowest."""

    @property
    def on_arrival(self) -> bool:
        """Whether a push is applied when it arrives, and not together with those of all other ranks."""
        return self.name is ModeName.ASYNC or self.staleness > 0

    @property
    def lead_max(self) -> int | None:
        """By how many steps a rank may be ahead of the slowest; None for any number."""
        return None if self.name is ModeName.ASYNC else self.staleness

    def __str__(self) -> str:
        return f"{self.name.value}:staleness={self.staleness}" if self.name is ModeName.SSP else self.name.value


SYNC = Mode()


def parse_mode(text: str) -> Mode:
    """Read a mode from text such as ``ssp:staleness=2``.

    Raises:
        UsageError: it is none; names what is known.
    """
    name, _, rest = text.partition(":")
    try:
        known = ModeName(name)
    except ValueError as error:
        raise UsageError(f"mode {text!r}: there is no {name!r}; use {_KNOWN}") from error
    if known is not ModeName.SSP:
        if rest:
            raise UsageError(f"mode {text!r}: {name} takes no options; use {_KNOWN}")
        return Mode(known)
    key, _, number = rest.partition("=")
    if key != "staleness" or not number.isascii() or not number.isdigit() or int(number) > _STALENESS_MAX:
        raise UsageError(f"mode {text!r}: give ssp its bound in whole steps, as in ssp:staleness=2")
    return Mode(known, int(number))
