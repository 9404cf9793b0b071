"""`psa report`: reads what Redis has of a job, prints its numbers, and writes a page and a picture."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from psa_store.checkpoint.catalog import read_job
from psa_store.cli.options import Job, reach
from psa_store.errors import UsageError
from psa_store.logs import escaped
from psa_store.observe import JobHistory
from psa_store.observe.formatting import duration
from psa_store.observe.report import check_matplotlib, describe_run, facts, pause, to_json, write_report
from psa_store.storage import RedisStore

_FAILURES_SHOWN = 20

app = typer.Typer()


@app.command()
def report(
    job: Job,
    out: Annotated[Path, typer.Option(help="folder for report-JOB.html and report-JOB.png")] = Path("."),
    as_json: Annotated[
        bool, typer.Option("--json", help="for programs: the numbers, and the paths of the files")
    ] = False,
) -> None:
    """Tell what became of a job, running or ended: loss, throughput, members, each failure and its cost, goodput.

    Prints the numbers, and writes a page that needs no network and a picture. All of it comes from the history that
    the job keeps in Redis. Needs matplotlib, which the extra `report` of this package brings.

    Example: psa report shakespeare --out reports
    """
    settings = reach("report")
    check_matplotlib()
    with RedisStore.from_settings(settings) as store, closing(JobHistory.from_settings(job, settings)) as history:
        found = read_job(store, job)
        points, events = escaped(history.curve()), escaped(history.events())
    if not points and not events:
        raise UsageError(f"job {job!r} has no history: it never ran, or with PSA_MONITOR=0")
    run = describe_run(job, points, events, found.checkpoints.values(), found.config)
    paths = [str(path) for path in write_report(run, out)]
    if as_json:
        print(json.dumps({**to_json(run), "files": paths}, indent=1))
        return
    console = Console(markup=False, emoji=False, highlight=False)
    for name, value in facts(run):
        console.print(f"{name:>14}  {value}")
    if run.failures:
        table = Table("", "failure", "after", "pause", "computed again", box=None, pad_edge=False)
        for number, each in list(enumerate(run.failures, 1))[-_FAILURES_SHOWN:]:
            after = duration(max(0.0, each.time - (run.begin or 0.0)))
            table.add_row(str(number), each.what, after, pause(each, run.interval_s), str(each.computed_again))
        console.print(table)
    print("\n".join(paths))
