"""`psa job`: what can be done with a job as a whole."""

from __future__ import annotations

from typing import Annotated

import typer

from psa_store.checkpoint.catalog import read_job
from psa_store.checkpoint.removal import check_removable, remove_job
from psa_store.cli.options import Yes, confirm, reach
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, UnknownJob
from psa_store.job.config import check_job_name
from psa_store.observe.formatting import size
from psa_store.storage import RedisStore

app = typer.Typer(name="job", help="A job as a whole.")


@app.callback()
def _job() -> None:
    """A job as a whole. `psa status` lists all jobs."""


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
