"""`psa estimate`: what a job would take, printed as tables or as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from psa_store.cli.options import SCRIPT, Json, Module, Script, begin, check_script, sigterm_interrupts
from psa_store.config import Settings, as_environment
from psa_store.config.private_servers import redis_of
from psa_store.errors import DependencyUnreachable, Disconnected, UsageError
from psa_store.estimate import Forecast, Traffic, ask_script, forecast, measure, traffic_of
from psa_store.estimate.traffic import WorkerShare
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, TensorRole
from psa_store.observe.doctor.footprint import Footprint, footprint_of
from psa_store.observe.doctor.redis import ALLOCATION, may_measure
from psa_store.observe.formatting import cells, count, milliseconds, model_parts, size
from psa_store.storage import examine_redis, measure_redis

_SCRIPT_S = 600.0
_ROWS_MAX = 16

app = typer.Typer()


@app.command(context_settings=SCRIPT)
def estimate(
    context: typer.Context,
    script: Script,
    module: Module = False,
    workers: Annotated[int, typer.Option(min=1, help="worker processes")] = 2,
    servers: Annotated[int, typer.Option(min=1, help="server processes")] = 1,
    ranks: Annotated[int | None, typer.Option(min=1, help="world size [default: --workers]")] = None,
    compute_ms: Annotated[
        float | None, typer.Option(min=0, help="forward and backward of a step, to add [default: unknown]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Tell what a job would take: shards, bytes a step sends, memory of Redis, and time, from speeds measured here.

    Runs the script up to its psa.Worker and stops it there; nothing is trained or stored, and neither Redis nor
    ZooKeeper is needed. Where Redis is known, 32 MiB are moved through it in keys of their own, as `psa doctor` does.
    Of a model in stages it tells the cells of each worker, and the bubble of the pipeline, too. With resident_stages of
    the script it tells how often a worker loads a stage in a step, and how many cells go forward twice.
    Mode, compression and the like are those of the script, of PSA_MODE, PSA_COMPRESS, … and of psa.toml, as for
    `psa run`.

    Example: psa estimate --workers 8 --servers 2 train.py --layers 12
    """
    check_script(script, module)
    settings = begin("estimate")
    environment = {**os.environ, **as_environment(settings), "PSA_DEFAULT_RANKS": str(workers)}
    if ranks is not None:
        environment["PSA_RANKS"] = str(ranks)
    with sigterm_interrupts():
        command = ["-m", script] if module else [script]
        config, layout, resident = ask_script(command, context.args, environment, _SCRIPT_S)
        redis_bytes_per_s, why_not = _measure_redis(settings)
        try:
            speeds = measure(config, layout, redis_bytes_per_s)
        except Disconnected as error:
            raise UsageError(f"{error}. `ip link set lo up`: the speed of TCP is measured there") from error
    ways = []
    for name, shares in (("shared memory", True), ("TCP", False)):
        if shares and (settings.carrier == "tcp" or not config.shares_memory):
            continue
        traffic = traffic_of(config, layout, workers, servers, shares_memory=shares, resident_stages=resident)
        compute_s = (compute_ms or 0.0) / 1e3
        ways.append(_Way(name, traffic, forecast(config, layout, traffic, speeds, settings.server_threads, compute_s)))
    footprint = footprint_of(config, layout)
    if as_json:
        print(json.dumps({**_document(config, layout, footprint, ways), "speeds": asdict(speeds)}, indent=1))
        return
    console = Console(highlight=False, markup=False, emoji=False)
    _print(console, config, layout, footprint, ways)
    if why_not:
        console.print(f"Redis was not measured: {why_not}")
    if compute_ms is None:
        console.print("What your script computes is not in this; --compute-ms adds it.")


@dataclass(frozen=True, slots=True)
class _Way:
    """One way in which workers may reach servers, with what that sends and takes."""

    name: str
    traffic: Traffic
    forecast: Forecast


def _measure_redis(settings: Settings) -> tuple[float | None, str]:
    """What Redis takes in, in bytes per second, or None and why that is not known."""
    url = redis_of(settings)
    if url is None:
        return None, "PSA_REDIS is not set, and no private one runs (`psa up`)"
    try:
        if not may_measure(examine_redis(url, settings.connect_timeout_s)):
            return None, "it has too little memory left, or is a replica; see `psa doctor`"
        return measure_redis(url, settings.connect_timeout_s).write_bytes_per_s, ""
    except DependencyUnreachable as error:
        return None, str(error)


def _document(config: JobConfig, layout: Layout, footprint: Footprint, ways: Sequence[_Way]) -> dict[str, Any]:
    traffic = ways[-1].traffic
    return {
        "job": config.name,
        "mode": str(config.mode),
        "compression": str(config.compression),
        "ranks": config.ranks,
        "shards": len(layout.shards),
        "shard_bytes": layout.shard_bytes,
        "parameter_bytes": layout.arena_bytes,
        "servers": [asdict(server) for server in traffic.servers],
        "workers": [
            {"ranks": list(each.ranks), **(asdict(each) if config.stages > 1 else {})} for each in traffic.workers
        ],
        "redis": {
            "version_bytes": footprint.version_bytes,
            "versions": footprint.versions,
            "kept_bytes": _in_redis(footprint.kept_bytes),
            "most_bytes": _in_redis(footprint.kept_bytes + footprint.version_bytes),
        },
        "commit": {
            "every_steps": ways[-1].forecast.commit_interval_steps,
            "bytes": ways[-1].traffic.commit_bytes,
            "seconds": ways[-1].forecast.commit_s,
        },
        "ways": {
            way.name: {
                "links": [[asdict(link) for link in links] for links in way.traffic.links],
                "terms": {term.what: term.seconds for term in way.forecast.terms},
                "step_seconds": way.forecast.seconds,
            }
            for way in ways
        },
        **({"pipeline": _pipeline(config, traffic)} if config.stages > 1 else {}),
    }


def _pipeline(config: JobConfig, traffic: Traffic) -> dict[str, Any]:
    """What stages add. ``carries``: how many a step sends from worker to worker, forward and backward."""
    return {
        "stages": config.stages,
        "microbatches": config.microbatches,
        "bubble": config.bubble,
        "cuts": traffic.cuts,
        "carries": 2 * config.microbatches * traffic.cuts,
        "carry_bytes": None,
    }


def _print(console: Console, config: JobConfig, layout: Layout, footprint: Footprint, ways: Sequence[_Way]) -> None:
    frozen = sum(shard.size_bytes for shard in layout.shards_of(TensorRole.FROZEN))
    parts = model_parts(config.stages, config.microbatches)
    console.print(
        f"job {config.name}: mode {config.mode}, {config.ranks} ranks, {f'{parts}, ' if parts else ''}"
        f"compression {config.compression}; "
        f"{len(layout.shards)} shards of up to {size(layout.shard_bytes)}, "
        f"{size(layout.arena_bytes)} of parameters and buffers{f', {size(frozen)} of them frozen' if frozen else ''}"
    )
    console.print(
        f"Redis: {size(_in_redis(footprint.kept_bytes))} for {footprint.versions} versions, "
        f"{size(_in_redis(footprint.kept_bytes + footprint.version_bytes))} while the next is written; "
        f"twice that while it rewrites its log"
    )
    console.print(_commits(ways[-1]))
    if config.stages > 1:
        console.print(_pipeline_text(config, ways[-1].traffic))
    for way in ways:
        console.print(_processes(way, config.stages > 1))
    console.print(_times(ways))


def _commits(way: _Way) -> str:
    steps, seconds = way.forecast.commit_interval_steps, way.forecast.commit_s
    if not steps:
        return "no commits but at hand-over and at the end"
    takes = "" if seconds is None else f", {seconds:.2f} s to write, in the background"
    return f"a commit every {steps:g} steps: {size(way.traffic.commit_bytes)} to Redis{takes}"


def _pipeline_text(config: JobConfig, traffic: Traffic) -> str:
    stages, microbatches = config.stages, config.microbatches
    carries = 2 * microbatches * traffic.cuts
    crossing = "none" if not carries else f"{carries} (2 x {microbatches} micro-batches x {count(traffic.cuts, 'cut')})"
    return (
        f"pipeline: with a worker for each of the {config.cells} cells, each waits {config.bubble:.0%} of the time, "
        f"{stages - 1} of {microbatches + stages - 1} turns; more micro-batches make that less\n"
        f"between workers a step sends carries, or gradients of them: {crossing}; their size shows only when stages "
        "compute, so neither bytes nor times below have them"
    )


def _processes(way: _Way, staged: bool) -> Table:
    table = Table("process", "owns / computes", "in, a step", "out, a step", "to Redis, a commit", title=way.name)
    table.title_justify = "left"
    for index, (server, column) in enumerate(
        zip(way.traffic.servers, zip(*way.traffic.links, strict=True), strict=True)
    ):
        if index < _ROWS_MAX:
            sent, got = sum(link.down_bytes for link in column), sum(link.up_bytes for link in column)
            owned_shards = f"{server.shards} shards, {size(server.parameter_bytes)}"
            table.add_row(f"server {index}", owned_shards, size(got), size(sent), size(server.commit_bytes))
    for index, (share, links) in enumerate(zip(way.traffic.workers, way.traffic.links, strict=True)):
        if index < _ROWS_MAX:
            sent, got = sum(link.up_bytes for link in links), sum(link.down_bytes for link in links)
            table.add_row(f"worker {index}", _computes(share, staged), size(got), size(sent), "")
    hidden = max(0, len(way.traffic.servers) - _ROWS_MAX) + max(0, len(way.traffic.workers) - _ROWS_MAX)
    if hidden:
        table.add_row(f"… {hidden} more", "see --json", "", "", "")
    return table


def _computes(share: WorkerShare, staged: bool) -> str:
    if not share.cells:
        return "stands by"
    if not staged:
        return count(len(share.ranks), "rank")
    memory = f"{size(share.parameter_bytes)} and {size(share.gradient_bytes)} of gradients"
    if share.loads:
        memory += f" at once; {count(len(share.loads), 'load')}, {count(share.twice, 'cell')} forward twice"
    return f"{cells(share.cells)}, {memory}"


def _times(ways: Sequence[_Way]) -> Table:
    table = Table("a step on this machine takes at least", *(way.name for way in ways))
    for column in table.columns[1:]:
        column.justify = "right"
    by_name = [{term.what: term.seconds for term in way.forecast.terms} for way in ways]
    for what in dict.fromkeys(name for terms in by_name for name in terms):
        table.add_row(what, *(milliseconds(terms.get(what, 0.0), 2) for terms in by_name))
    table.add_section()
    table.add_row("together", *(milliseconds(way.forecast.seconds, 2) for way in ways))
    return table


def _in_redis(size_bytes: int) -> int:
    return round(size_bytes * ALLOCATION)
