"""What is known of one run when the campaign is over."""

from __future__ import annotations

from dataclasses import dataclass

from chaos.check import Verdict
from chaos.journal import Journal


@dataclass(frozen=True, slots=True)
class Run:
    """One run and its verdict; the journal only where somebody may want to see it."""

    name: str
    seed: int
    replay: str
    journal: Journal | None
    verdict: Verdict
