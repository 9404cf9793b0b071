"""`psa chaos`: the harness lies beside the package in the repository, and is no part of what is installed."""

from __future__ import annotations

import re
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

import psa_store
from psa_store.cli.options import begin
from psa_store.errors import UsageError

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(s|m|h)")
_UNITS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}

app = typer.Typer(
    name="chaos", help="Prove the promises: train while nodes are killed, paused and cut off. From a checkout only."
)


@app.command("run")
def chaos_run(
    scenario: Annotated[str, typer.Option(help="NAME, or several separated by commas, all, or soak")] = "soak",
    seed: Annotated[int, typer.Option(help="the same seed gives the same faults")] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="play each scenario with so many seeds, from --seed on")] = 1,
    duration: Annotated[
        str | None, typer.Option(help="train so long with a fault every --every: 90s, 10m, 1h [default: short runs]")
    ] = None,
    every: Annotated[str, typer.Option(help="time between faults of a long run")] = "10s",
    out: Annotated[Path | None, typer.Option(help="folder for journals and report [default: a new one]")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="keep the journals of runs in which nothing was wrong")] = False,
) -> None:
    """Train on a private cluster while faults happen as planned by a seed, then check every promise from outside.

    Starts three ZooKeeper nodes, Redis, and a job of three workers; leaves nothing behind but report.html and
    report.png. Exits with 1 if a promise was broken or a fault did not happen. `psa chaos list` names the scenarios.

    Example: psa chaos run --scenario soak --duration 10m --every 10s --seed 7
    Example: psa chaos run --scenario all --seeds 20
    """
    begin("chaos")
    _find_harness()
    from chaos.campaign import Campaign, run_campaign

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is ended on the way out

    run_campaign(
        Campaign(
            names=scenario.split(","),
            seeds=range(seed, seed + seeds),
            duration_s=None if duration is None else seconds("--duration", duration),
            every_s=seconds("--every", every),
            folder=(out or Path(tempfile.mkdtemp(prefix="psa-chaos-"))).absolute(),
            keep=keep,
        )
    )


@app.command("list")
def chaos_list() -> None:
    """Name every scenario and its faults."""
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
