"""`psa bench`: from options to a run of the comparison, and from its results to tables, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from psa_store.bench.chart import check_matplotlib, draw
from psa_store.bench.document import to_document
from psa_store.bench.driver import run_bench
from psa_store.bench.report import print_report
from psa_store.bench.request import STEPS_MAX, Bench, Carrier, Rule
from psa_store.cli.options import begin, sigterm_interrupts
from psa_store.errors import UsageError

app = typer.Typer()


@app.command()
def bench(
    megabytes: Annotated[float, typer.Option(help="size of the parameters, float32, 10^6 bytes each")] = 100.0,
    workers: Annotated[
        list[str] | None, typer.Option(help="numbers of workers, repeated or separated by commas (default 2,4)")
    ] = None,
    optimizer: Annotated[Rule, typer.Option(help="what updates the parameters")] = Rule.SGD,
    clip: Annotated[float | None, typer.Option(help="clip by global norm (default: do not)")] = None,
    carrier: Annotated[Carrier, typer.Option(help="how psa's workers reach its server")] = Carrier.BOTH,
    peers: Annotated[bool, typer.Option(help="gloo, torch.distributed.rpc, and ray if it is installed")] = True,
    limits: Annotated[bool, typer.Option(help="the floor, memcpy, loopback TCP, Redis")] = True,
    rounds: Annotated[int, typer.Option(min=1, help="blocks of each contender")] = 7,
    steps: Annotated[int, typer.Option(min=1, max=STEPS_MAX, help="timed steps in a block")] = 5,
    json_path: Annotated[Path | None, typer.Option("--json", help="file for all figures")] = None,
    png_path: Annotated[Path | None, typer.Option("--png", help="file for a picture; needs matplotlib")] = None,
) -> None:
    """Measure a step (push, reduction, update, pull; nothing is computed) beside peers and the limits of this machine.

    All take turns in one run, on the same gradients, and prove their result. Uses a private Redis and ZooKeeper.
    With three numbers of workers or more it also prints what an added worker costs.

    Example: psa bench --json bench.json --png bench.png
    Example: psa bench --workers 2,3,4,6,8 --no-peers
    """
    begin("bench")
    wanted = Bench(
        elements=round(megabytes * 1e6 / 4),
        workers=numbers("--workers", workers or ["2,4"]),
        rule=optimizer,
        clip=clip,
        carrier=carrier,
        peers=peers,
        limits=limits,
        rounds=rounds,
        steps=steps,
    )
    for path in (json_path, png_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: there is no folder {path.absolute().parent}")
    if png_path is not None:
        check_matplotlib()
    progress = Console(stderr=True, highlight=False, style="dim")
    with sigterm_interrupts():
        comparison = run_bench(wanted, progress.print)
    print_report(comparison, Console(highlight=False))
    if json_path is not None:
        json_path.write_text(json.dumps(to_document(comparison), indent=1) + "\n")
    if png_path is not None:
        draw(comparison, png_path)


def numbers(option: str, words: Sequence[str]) -> tuple[int, ...]:
    """The numbers of an option that may be repeated and may hold several, separated by commas; raises UsageError."""
    try:
        return tuple(int(part) for word in words for part in word.split(","))
    except ValueError as error:
        raise UsageError(f"{option} {','.join(words)}: use numbers, for example {option} 2,4") from error
