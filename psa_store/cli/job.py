"""`psa job`: what can be done with a job as a whole."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.change import change_job, check_change
from psa_store.checkpoint.removal import check_removable, remove_job
from psa_store.cli.options import Yes, confirm, reach
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, UnknownJob, UsageError
from psa_store.job.change import LOOP_NUMBERS, NUMBERS, Numbers
from psa_store.job.config import check_job_name
from psa_store.observe import Event, EventKind, add_if_possible
from psa_store.observe.formatting import size
from psa_store.storage import RedisStore

app = typer.Typer(name="job", help="A job as a whole.")


@app.callback()
def _job() -> None:
    """A job as a whole. `psa status` lists all jobs."""


@app.command("set")
def job_set(
    name: Annotated[str, typer.Argument(help="name of the job")],
    numbers: Annotated[
        list[str], typer.Argument(help="lr=, weight_decay=, clip_grad_norm= (0: no limit), batch_size=, steps=")
    ],
    yes: Yes = False,
) -> None:
    """Change numbers of a job from its newest durable version on: of its optimizer, or batch size and end.

    A job that runs goes back to that version, at most commit_every steps, and on with the change. The change belongs to
    the job: it is there after a resume, a rollback, in a fork and in exports. The script may say either what the job
    began with, or what it has now; where the job ends is what was set last, whatever the script says.

    Example: psa job set shakespeare lr=1e-4 clip_grad_norm=0.5
    """
    wanted = _numbers(numbers)
    settings = reach("job")
    with (
        RedisStore.from_settings(settings) as store,
        Coordination.from_settings(settings, check_job_name(name)) as coordination,
    ):
        store.check()
        version = read_job(store, name).version_of(None)
        check_change(store, coordination, name, wanted)
        confirm(f"Job {name} goes on from version {version} with {wanted}.", yes)
        done = change_job(store, coordination, name, wanted)
        text = f"from version {done.version} on {wanted}; term {done.term} began there"
        event = Event(time.time(), EventKind.CHANGED, text, term=done.term, version=done.version)
        add_if_possible(name, settings, event)
    print(f"job {name}: from version {done.version} on {wanted}")


def _numbers(texts: list[str]) -> Numbers:
    """Read ``lr=0.1`` and the like."""
    given: dict[str, Any] = {}
    for each in texts:
        name, _, value = each.partition("=")
        if name not in NUMBERS:
            hint = "; for clip write clip_grad_norm" if name == "clip" else ""
            raise UsageError(f"{each!r}: a job's {', '.join(NUMBERS)} can be set, as in lr=0.001{hint}")
        try:
            given[name] = int(value) if name in LOOP_NUMBERS else float(value)
        except ValueError:
            raise UsageError(f"{each!r}: {value!r} is no {'whole ' * (name in LOOP_NUMBERS)}number") from None
    return Numbers(**given)


@app.command("rm")
def job_rm(names: Annotated[list[str], typer.Argument(help="names of jobs")], yes: Yes = False) -> None:
    """Remove jobs for good: their versions, checkpoints and history in Redis, and what ZooKeeper knows of them.

    Refused while a process of the job lives, and while a fork still shares its parameters. Exported files stay.

    Example: psa job rm shakespeare
    """
    settings = reach("job")
    with RedisStore.from_settings(settings) as store:
        store.check()
        for name in names:
            with Coordination.from_settings(settings, check_job_name(name)) as coordination:
                check_removable(store, coordination, name)
                confirm(f"Job {name} is removed for good: {_contents(store, name)}.", yes)
                done = remove_job(store, coordination, name)
            print(f"removed job {name}: {done.keys} keys, {size(done.size_bytes)} of Redis, {done.znodes} znodes")


def _contents(store: RedisStore, job: str) -> str:
    try:
        stored = read_job(store, job)
        versions = ", ".join(map(str, stored.versions())) or "none"
        return f"versions {versions}; checkpoints {', '.join(stored.checkpoints) or 'none'}"
    except UnknownJob:
        return "Redis has nothing that can be trained"
    except DataIntegrity as error:
        return f"it is damaged ({error})"
