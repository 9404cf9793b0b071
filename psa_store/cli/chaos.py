"""`psa chaos`: the harness lies beside the package in the repository, and is no part of what is installed."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psa_store
from psa_store.errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command, as typed."""

    scenario: str
    seeds: Sequence[int]
    duration: str | None
    every: str
    out: Path | None
    keep: bool


def run_chaos(options: Options) -> None:
    """Play scenarios and check them; raise an error with exit code 1 if a promise was broken."""
    _find_harness()
    from chaos.campaign import Campaign, run_campaign

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended on the way out

    run_campaign(
        Campaign(
            names=options.scenario.split(","),
            seeds=options.seeds,
            duration_s=None if options.duration is None else seconds("--duration", options.duration),
            every_s=seconds("--every", options.every),
            folder=(options.out or Path(tempfile.mkdtemp(prefix="psa-chaos-"))).absolute(),
            keep=options.keep,
        )
    )


def list_scenarios() -> None:
    """Print every scenario with its faults."""
    _find_harness()
    from chaos.faults import FAULTS
    from chaos.scenarios import SCENARIOS

    for name, row in SCENARIOS.items():
        print(f"{name:<30} {'; '.join(FAULTS[kind].what for kind in row.kinds[:2])}{' …' * (len(row.kinds) > 2)}")


def seconds(option: str, text: str) -> float:
    """Parse "90s", "10m" or "1h"; raise UsageError."""
    found = _DURATION.fullmatch(text)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"{option} {text}: use a number and a unit, as in 90s, 10m or 1h")
    return float(found[1]) * _UNITS_S[found[2]]


def _find_harness() -> None:
    """Make the folder ``chaos`` importable.

    Raises:
        UsageError: this is no checkout, or what the harness needs is not installed.
    """
    checkout = Path(psa_store.__file__).parents[1]
    if not (checkout / "chaos" / "campaign.py").is_file():
        raise UsageError("the chaos harness is part of the repository: clone it, and run `psa chaos` from there")
    if str(checkout) not in sys.path:
        sys.path.insert(0, str(checkout))
    try:
        import matplotlib  # noqa: F401
        import psutil  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{error.name} is not installed: `pip install 'psa_store[chaos]'`") from error
