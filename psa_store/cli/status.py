"""`psa status`: looks at jobs, once or every second, and shows their status as tables or as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live

from psa_store.cli.options import read_settings
from psa_store.cli.status_view import finding_view, job_view, overview
from psa_store.cli.tables import printer
from psa_store.config import Settings, fill_addresses
from psa_store.errors import DataIntegrity, DependencyUnreachable
from psa_store.job.document import to_fields
from psa_store.logs import escaped
from psa_store.observe.status import PATIENCE_S_MAX, Finding, JobStatus, Observer, Severity, known_jobs
from psa_store.storage import RedisStore

_LOOK_EVERY_S = 1.0
_LOOKS_AT_ONCE = 8

app = typer.Typer()


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="name of the job [default: all jobs, one line each]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again every second, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs; with --watch, one document a line")] = False,
) -> None:
    """Show what is sick, what each process owns or computes, which versions are stored, how Redis and ZooKeeper are.

    What is sick comes first, each with the command that looks further. Exits with 3 if Redis or ZooKeeper is away, and
    then shows what the other one knows; with 4 if stored data are damaged.

    Example: psa status shakespeare --watch
    """
    settings = read_settings()
    raise typer.Exit(watch_job(job, as_json, settings) if watch else show(job, as_json, settings))


def show(job: str | None, as_json: bool, settings: Settings) -> int:
    """Print the state of a job, or of all jobs; returns the exit code.

    Raises:
        UnknownJob: there is no such job; the message lists those that exist.
        UsageError: no address of Redis or ZooKeeper is known.
        DependencyUnreachable: both are away, and no job is named.
    """
    with closing(_Looker(job, fill_addresses(settings))) as looker:
        found = looker.look()
    if as_json:
        print(_json(job, found, indent=1))
    else:
        console = printer()
        console.print(_view(job, found, console.width))
    return _exit_code(found)


def watch_job(job: str | None, as_json: bool, settings: Settings) -> int:
    """Look again every second until Ctrl-C or until the output is closed; an outage is shown, and does not end it.

    Raises:
        UnknownJob, UsageError: as in :func:`show`.
    """
    console = printer()
    with ExitStack() as stack:
        looker = stack.enter_context(closing(_Looker(job, fill_addresses(settings))))
        try:
            if console.is_terminal and not as_json:
                live = stack.enter_context(Live(console=console, screen=True, auto_refresh=False))
            else:
                live = None
            while True:
                began_s = time.monotonic()
                _show_once(job, looker, as_json, console, live)
                time.sleep(max(0.0, began_s + _LOOK_EVERY_S - time.monotonic()))
        except KeyboardInterrupt:
            return 0
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains once more at its end
            return 0


def _show_once(job: str | None, looker: _Looker, as_json: bool, console: Console, live: Live | None) -> None:
    found: list[JobStatus] = []
    shown: RenderableType
    try:
        found = looker.look()
        shown = _view(job, found, console.width)
    except DependencyUnreachable as error:
        shown = finding_view(Finding(Severity.SICK, str(error), "", "psa doctor"))
        if as_json:
            print(f"psa: {escaped(str(error))}", file=sys.stderr)
    if as_json:
        print(_json(job, found), flush=True)
    elif live is not None:
        live.update(shown, refresh=True)
    else:
        console.print(shown)
        sys.stdout.flush()


class _Looker:
    """Gets the status of one job or of all, through sessions that it keeps until it is closed."""

    def __init__(self, job: str | None, settings: Settings) -> None:
        assert settings.redis is not None
        self._job = job
        self._settings = settings
        self._store = RedisStore(settings.redis, timeout_s=min(settings.connect_timeout_s, PATIENCE_S_MAX))
        self._observers: dict[str, Observer] = {}

    def close(self) -> None:
        for observer in self._observers.values():
            observer.close()
        self._store.close()

    def look(self) -> list[JobStatus]:
        names = known_jobs(self._settings, self._store) if self._job is None else [self._job]
        for gone in self._observers.keys() - set(names):
            self._observers.pop(gone).close()
        for name in names:
            if name not in self._observers:
                self._observers[name] = Observer(name, self._settings, self._store)
        if len(names) == 1:
            return [self._observers[names[0]].look()]
        with ThreadPoolExecutor(_LOOKS_AT_ONCE, thread_name_prefix="psa-status-job") as pool:
            return list(pool.map(lambda name: self._observers[name].look(), names))


def _view(job: str | None, found: Sequence[JobStatus], width: int) -> RenderableType:
    return overview(found, width) if job is None else job_view(found[0], width)


def _json(job: str | None, found: Sequence[JobStatus], indent: int | None = None) -> str:
    """One document if a job was named, else a list; see docs/reference/status.schema.json."""
    fields = [to_fields(each) for each in found]
    return json.dumps(fields if job is None else fields[0], indent=indent)


def _exit_code(found: Sequence[JobStatus]) -> int:
    if any(each.redis.problem or each.zookeeper.problem for each in found):
        return DependencyUnreachable.exit_code
    return DataIntegrity.exit_code if any(each.redis.damage for each in found) else 0
