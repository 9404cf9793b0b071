"""The result of one run, as the report shows it."""

from __future__ import annotations

from dataclasses import dataclass

from chaos.check import Verdict
from chaos.history import History


@dataclass(frozen=True, slots=True)
class Run:
    """One run and its verdict; the history only of runs that the report may draw."""

    name: str
    seed: int
    replay: str
    history: History | None
    verdict: Verdict
