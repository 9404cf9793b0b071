"""`psa checkpoint`: what its commands print. What they do is in :mod:`psa_store.checkpoint`."""

from __future__ import annotations

import json
import os
import shlex
import threading
import time
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from psa_store.checkpoint import catalog
from psa_store.checkpoint.catalog import StoredJob, read_job
from psa_store.checkpoint.comparison import compare
from psa_store.checkpoint.fork import fork as make_fork
from psa_store.checkpoint.reader import find_damage
from psa_store.checkpoint.rollback import RolledBack
from psa_store.checkpoint.rollback import rollback as roll_back
from psa_store.checkpoint.take import take
from psa_store.cli.options import Job, Json, Yes, check_script, confirm, reach
from psa_store.cli.tables import plain, print_named, printer
from psa_store.cli.transfer import export_files, import_files
from psa_store.config import Settings, as_environment
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, UsageError
from psa_store.estimate import ask_script
from psa_store.job.config import check_job_name
from psa_store.logs import escaped
from psa_store.observe import Event, EventKind, add_if_possible
from psa_store.observe.formatting import date, size
from psa_store.storage import RedisStore

_SCRIPT_S = 600.0
app = typer.Typer(
    name="checkpoint",
    help="Versions that are kept: take, compare, check, go back to, fork, remove, move to files. "
    "WHAT is the name of a checkpoint, or the number of a version that is still stored.",
)

What = Annotated[str, typer.Argument(help="a checkpoint, or the number of a version")]


@app.command("save")
def checkpoint_save(
    job: Job,
    name: Annotated[
        str | None, typer.Option(help="keep it under this name until it is pruned [default: the time, and retention]")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds that it may take")] = 600.0,
) -> None:
    """Take a checkpoint now, while the job goes on; of a job that rests, keep its newest version.

    Example: psa checkpoint save shakespeare --name before-lr-change
    """
    settings = reach("checkpoint")
    woken = threading.Event()
    with (
        RedisStore.from_settings(settings) as store,
        Coordination.from_settings(settings, job, wake=woken.set) as coordination,
    ):
        store.check()
        done = take(store, coordination, woken, job, name, timeout)
    print(f"checkpoint {done.name} of job {job}: version {done.version}, {size(done.bytes)}")


@app.command("ls")
def checkpoint_ls(job: Job, as_json: Json = False) -> None:
    """List checkpoints, oldest version first, and the versions that training keeps.

    Example: psa checkpoint ls shakespeare
    """
    with RedisStore.from_settings(reach("checkpoint")) as store:
        stored = read_job(store, job)
    if as_json:
        listed = [{**asdict(each), "whole": stored.whole(each.name)} for each in stored.checkpoints.values()]
        print(json.dumps({"job": job, "checkpoints": listed, "versions": stored.versions()}, indent=1))
        return
    table = Table("checkpoint", "version", "step", "taken", "why", "size", "")
    names = [escaped(name) for name in stored.checkpoints]
    for name, each in zip(names, stored.checkpoints.values(), strict=True):
        whole = stored.whole(each.name)
        marks = [] if whole else ["not whole"]
        marks += ["named: kept until pruned"] if each.named else []
        cells = (each.version, each.step, date(each.created_s), each.reason, size(each.bytes), ", ".join(marks))
        table.add_row(*plain(name, *(escaped(str(cell)) for cell in cells)), style=None if whole else "red")
    console = printer()
    if stored.checkpoints:
        print_named(table, names, console)
    else:
        console.print(f"job {job} has no checkpoints")
    console.print(f"versions that training keeps: {', '.join(map(str, stored.versions())) or 'none'}")


@app.command("show")
def checkpoint_show(job: Job, what: What, as_json: Json = False) -> None:
    """Tell all about a checkpoint: when and why it was taken, how large its parts are, what the job is.

    Example: psa checkpoint show shakespeare before-lr-change
    """
    with RedisStore.from_settings(reach("checkpoint")) as store:
        stored = read_job(store, job)
    document = _document(stored, what)
    if as_json:
        print(json.dumps(document, indent=1))
        return
    for key, value in document.items():
        print(f"{key}: {json.dumps(value) if isinstance(value, (dict, list)) else value}")


@app.command("verify")
def checkpoint_verify(
    job: Job,
    what: Annotated[str | None, typer.Argument(help="a checkpoint, or a version [default: all of both]")] = None,
) -> None:
    """Read every byte and compare digests; exits with 4 if anything is damaged.

    Example: psa checkpoint verify shakespeare
    """
    with RedisStore.from_settings(reach("checkpoint")) as store:
        stored = read_job(store, job)
        names = [what] if what is not None else [*stored.checkpoints, *map(str, stored.versions())]
        damage = []
        for each in names:
            found = _damage(store, job, each)
            print(f"{each}: {'damaged' if found else 'whole'}")
            damage += found
    if damage:
        raise DataIntegrity("; ".join(dict.fromkeys(damage)))


@app.command("diff")
def checkpoint_diff(
    job: Job,
    a: What,
    b: What,
    of: Annotated[str | None, typer.Option(help="the job whose B is meant, such as a fork [default: JOB]")] = None,
    as_json: Json = False,
) -> None:
    """Show how far each parameter moved from A to B: norm, largest element, cosine.

    Example: psa checkpoint diff shakespeare before-lr-change 2000
    """
    with RedisStore.from_settings(reach("checkpoint")) as store:
        changes = compare(store, job, a, b, of)
    if as_json:
        print(json.dumps([asdict(each) for each in changes], indent=1))
        return
    table = Table("parameter", "elements", "|B-A|", "|B-A| / |A|", "max |B-A|", "cosine(A, B)")
    for each in changes:
        numbers = [f"{each.norm:.4g}", f"{each.relative:.4g}", f"{each.largest:.4g}", f"{each.cosine:.6f}"]
        table.add_row(*plain(each.name, each.elements, *numbers))
    print_named(table, [each.name for each in changes], printer())


@app.command("rollback")
def checkpoint_rollback(job: Job, what: What, yes: Yes = False) -> None:
    """Return to a checkpoint or an older version. A job that runs goes on from there; checkpoints stay.

    Example: psa checkpoint rollback shakespeare before-lr-change --yes
    """
    settings = reach("checkpoint")
    with RedisStore.from_settings(settings) as store, Coordination.from_settings(settings, job) as coordination:
        store.check()
        stored = read_job(store, job)
        version = stored.version_of(what)
        kept = {each.version for each in stored.checkpoints.values()}
        lost = [each for each in stored.versions() if each > version and each not in kept]
        loss = f" Versions {', '.join(map(str, lost))} are lost." if lost else ""
        confirm(f"Job {job} returns to version {version}.{loss}", yes)
        done = roll_back(store, coordination, job, what)
        _tell_history(job, what, done, settings)
    print(f"job {job} is at version {done.version}, term {done.term}")


@app.command("fork")
def checkpoint_fork(
    job: Job, what: What, new: Annotated[str, typer.Option("--as", help="name of the new job")]
) -> None:
    """Begin another job with a checkpoint of this one. Nothing is copied: both share what is stored.

    Example: psa checkpoint fork shakespeare before-lr-change --as hamlet
    """
    settings = reach("checkpoint")
    check_job_name(new)
    with RedisStore.from_settings(settings) as store, Coordination.from_settings(settings, new) as coordination:
        store.check()
        version = make_fork(store, coordination, job, what, new)
    print(f"job {new} begins at version {version} of job {job}; run the same script with this job name")


@app.command("export")
def checkpoint_export(
    job: Job,
    url: Annotated[str, typer.Argument(help="new folder: a path, or file://, s3://, hdfs://, … as fsspec knows them")],
    what: Annotated[str | None, typer.Argument(help="a checkpoint, or a version [default: the newest version]")] = None,
    max_file_gb: Annotated[float, typer.Option(min=0.001, help="size beyond which a file is split (10^9 bytes)")] = 5.0,
    average: Annotated[
        bool, typer.Option("--average", help="only the model, with the average of its parameters: to use, not to go on")
    ] = False,
) -> None:
    """Write a checkpoint to files: safetensors with the names of state_dict, and all that a job needs to go on.

    Of a model of transformers from_pretrained loads the folder: config.json is in it, and the script's tokenizer.

    Example: psa checkpoint export shakespeare s3://models/shakespeare-1 before-lr-change
    """
    export_files(job, what, url, reach("checkpoint"), int(max_file_gb * 1e9), average=average)


@app.command("import")
def checkpoint_import(
    url: Annotated[str, typer.Argument(help="folder that `psa checkpoint export` wrote")],
    job: Annotated[str, typer.Option("--as", help="name of the new job")],
    ranks: Annotated[int | None, typer.Option(min=1, help="another world size [default: as exported]")] = None,
    shard_bytes: Annotated[
        int | None, typer.Option(min=4096, help="another shard size, that of the script [default: as exported]")
    ] = None,
    like: Annotated[
        str | None, typer.Option(metavar="SCRIPT", help="cut the model as this script, with its arguments, does")
    ] = None,
) -> None:
    """Begin a job with an export. Its files are checked first; run the same script with this job name.

    With --like it gets the stages that the model has in a script, or none: that is run up to its psa.Worker.

    Example: psa checkpoint import s3://models/shakespeare-1 --as hamlet --ranks 8

    Example: psa checkpoint import shakespeare-1 --as hamlet --like "gpt.py --stages 4 --microbatches 8"
    """
    settings = reach("checkpoint")
    cut = None
    if like is not None:
        if shard_bytes is not None:
            raise UsageError("--shard-bytes does not go with --like: the script says that, too")
        script, *arguments = shlex.split(like)
        check_script(script, False)
        config, layout, _ = ask_script([script], arguments, {**os.environ, **as_environment(settings)}, _SCRIPT_S)
        cut = config, layout
    import_files(url, job, settings, ranks, shard_bytes, cut)


@app.command("prune")
def checkpoint_prune(
    job: Job,
    names: Annotated[list[str] | None, typer.Argument(help="checkpoints to remove")] = None,
    keep: Annotated[int | None, typer.Option(min=0, help="of those without a name, keep the newest so many")] = None,
    older_than: Annotated[float | None, typer.Option(min=0.0, help="of those, remove what is older (seconds)")] = None,
    yes: Yes = False,
) -> None:
    """Remove checkpoints, and free what nothing else needs. Those with a name go only when they are named here.

    Example: psa checkpoint prune shakespeare --keep 2 --yes
    """
    names = names or []
    if not names and keep is None and older_than is None:
        raise UsageError("say which: names of checkpoints, --keep N or --older-than SECONDS")
    with RedisStore.from_settings(reach("checkpoint")) as store:
        stored = read_job(store, job)
        for name in names:
            if name not in stored.checkpoints:
                known = ", ".join(stored.checkpoints) or "none"
                raise UsageError(f"job {job!r} has no checkpoint {name!r}; checkpoints: {known}")
        found = catalog.superfluous(stored.checkpoints.values(), keep=keep, older_than_s=older_than)
        gone = list(dict.fromkeys([*names, *found]))
        if gone:
            confirm(f"Checkpoints {', '.join(gone)} of job {job} are removed.", yes)
        catalog.remove(store, job, stored.layout, gone)
        catalog.sweep(store, job, stored.layout)
    print(f"removed: {', '.join(gone) or 'none'}")


def _document(stored: StoredJob, what: str) -> dict[str, object]:
    manifests = stored.manifests(what)
    sections: dict[str, int] = {}
    for manifest in manifests.values():
        for section in manifest.sections:
            sections[section.name] = sections.get(section.name, 0) + section.size_bytes
    own = asdict(stored.checkpoints[what]) if what in stored.checkpoints else {}
    return {
        "job": stored.config.name,
        "version": stored.version_of(what),
        **own,
        "config": stored.config.facts(),
        "shards": len(manifests),
        "tensors": len(stored.layout.tensors),
        "section_bytes": dict(sorted(sections.items())),
        "terms_written": sorted({manifest.term for manifest in manifests.values()}),
        "shared_with": sorted({manifest.home for manifest in manifests.values()} - {""}),
    }


def _damage(store: RedisStore, job: str, what: str) -> list[str]:
    try:
        return find_damage(store, job, what)
    except DataIntegrity as error:
        return [str(error)]


def _tell_history(job: str, what: str, done: RolledBack, settings: Settings) -> None:
    name = "" if what == str(done.version) else f"checkpoint {what}, "
    text = f"the job was told to go back to {name}version {done.version}; term {done.term} began there"
    event = Event(time.time(), EventKind.ROLLBACK, text, term=done.term, version=done.version)
    add_if_possible(job, settings, event)
