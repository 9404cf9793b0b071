"""`psa status`: looks at jobs, once or every second, shown as tables or as JSON."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

from rich.console import Console, RenderableType
from rich.live import Live

from psa_store.cli.status_view import apology, job_view, overview
from psa_store.config import Settings
from psa_store.errors import DataIntegrity, DependencyUnreachable
from psa_store.launch import fill_addresses
from psa_store.observe.status import PATIENCE_S_MAX, Observer, known_jobs
from psa_store.storage import RedisStore

_LOOK_EVERY_S = 1.0
_LOOKS_AT_ONCE = 8


def show(job: str | None, as_json: bool, settings: Settings) -> int:
    """Print the state of a job, or of all jobs; returns the exit code.

    Raises:
        UnknownJob: there is no such job; the message lists those that exist.
        UsageError: no address of Redis or ZooKeeper is known.
        DependencyUnreachable: both are away, and no job is named.
    """
    with closing(_Looker(job, fill_addresses(settings))) as looker:
        documents = looker.look()
    if as_json:
        print(json.dumps(documents[0] if job else documents, indent=1))
    else:
        console = Console(highlight=False)
        console.print(_view(job, documents, console.width))
    return _exit_code(documents)


def watch_job(job: str | None, as_json: bool, settings: Settings) -> int:
    """Look again every second until Ctrl-C, or until nobody reads any more; an outage is shown, and looked through.

    Raises:
        UnknownJob, UsageError: as in :func:`show`.
    """
    console = Console(highlight=False)
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
    documents: list[dict[str, Any]] = []
    shown: RenderableType
    try:
        documents = looker.look()
        shown = _view(job, documents, console.width)
    except DependencyUnreachable as error:
        shown = apology(str(error))
        if as_json:
            print(f"psa: {error}", file=sys.stderr)
    if as_json:
        print(json.dumps(documents[0] if job else documents), flush=True)
    elif live is not None:
        live.update(shown, refresh=True)
    else:
        console.print(shown)
        sys.stdout.flush()


class _Looker:
    """Looks at one job or at all, through sessions that it keeps until it is closed."""

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

    def look(self) -> list[dict[str, Any]]:
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


def _view(job: str | None, documents: Sequence[dict[str, Any]], width: int) -> RenderableType:
    return overview(documents, width) if job is None else job_view(documents[0], width)


def _exit_code(documents: Sequence[dict[str, Any]]) -> int:
    if any(each["redis"]["problem"] or each["zookeeper"]["problem"] for each in documents):
        return DependencyUnreachable.exit_code
    return DataIntegrity.exit_code if any(each["redis"]["damage"] for each in documents) else 0
