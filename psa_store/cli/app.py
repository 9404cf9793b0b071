"""The commands of `psa` by name, each in a module that is imported when the command is used, and the exit codes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from psa_store import logs
from psa_store.errors import PsaError

EXIT_CODES = """
Exit codes: 0 done (or left cleanly on SIGTERM) · 1 user code failed, or restarts used up · 2 bad usage, or the job
does not fit · 3 Redis or ZooKeeper unreachable or unfit · 4 stored data damaged · 130 interrupted.
"""
COMMANDS = {
    "run": ("run", "Train: start workers and servers on this machine, watch them, restart what dies."),
    "server": ("members", "Serve shards of a job until SIGTERM; then hand them over and exit."),
    "worker": ("members", "Run a training script as one more worker of its job."),
    "estimate": ("estimate", "Tell what a job would take: bytes a step sends, memory of Redis, time."),
    "up": ("up", "Start a private Redis and ZooKeeper in the background."),
    "down": ("up", "Stop the private Redis and ZooKeeper that `psa up` started."),
    "status": ("status", "Show what is sick, what each process does, and what is stored."),
    "report": ("report", "Tell what became of a job: loss, throughput, each failure and its cost."),
    "config": ("config", "Settings: from flags, else PSA_* variables, else psa.toml, else defaults."),
    "doctor": ("doctor", "Check this machine, Redis and ZooKeeper, and say how to mend them."),
    "bench": ("bench", "Measure a step beside peers and the limits of this machine."),
    "checkpoint": ("checkpoint", "Versions that are kept: take, compare, check, go back to, fork, move to files."),
    "chaos": ("chaos", "Prove the promises: train while nodes are killed, paused and cut off."),
}
"""Name of each command: its module in this package, which has it in ``app``, and the line of `psa --help` about it."""


def typer_of(name: str) -> typer.Typer:
    """The typer of a command, or of a group; it may have further commands, which share a module."""
    found: typer.Typer = import_module(f"psa_store.cli.{COMMANDS[name][0]}").app
    return found


class _Commands(MutableMapping[str, Any]):
    """The commands, each imported when it is looked up."""

    def __getitem__(self, name: str) -> Any:
        found: Any = get_command(typer_of(name))
        return getattr(found, "commands", {}).get(name, found)  # a module may have several commands

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __setitem__(self, name: str, command: Any) -> None:
        raise TypeError("commands stand in COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError("commands stand in COMMANDS")


class _Psa(TyperGroup):
    """Lists its commands without importing them, for `psa --help` and for completion."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._arguments = arguments
        self.commands = _Commands()

    def format_help(self, ctx: Any, formatter: Any) -> None:
        self._listing().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        return self._listing().shell_complete(ctx, incomplete)

    def _listing(self) -> TyperGroup:
        lines = {name: TyperCommand(name, help=line) for name, (_, line) in COMMANDS.items()}
        return TyperGroup(**{**self._arguments, "commands": lines, "params": self.params})


app = typer.Typer(
    name="psa",
    cls=_Psa,
    help="A fault-tolerant parameter server for PyTorch: versioned shards in Redis, coordination in ZooKeeper.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)



@app.command(context_settings=_SCRIPT)
def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="training script; what follows it are its arguments")],
    workers: Annotated[int, typer.Option(min=1, help="worker processes on this machine")] = 2,
    servers: Annotated[int, typer.Option(min=1, help="server processes on this machine")] = 1,
    ranks: Annotated[int | None, typer.Option(min=1, help="world size of a new job [default: --workers]")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="restarts of dead processes before giving up")] = 100,
    commit_every: Annotated[int | None, typer.Option(min=0, help="steps between commits of a new job")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="new job: sync, async, ssp:staleness=N, or local:steps=H; see the README [default: sync]"),
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(help="new job: send gradients as bf16, fp16, int8, int4 or topk:0.01; bf16:both: parameters too"),
    ] = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="new job: skip steps with NaN or Inf gradients")
    ] = False,
    checkpoint_every: Annotated[
        float | None, typer.Option(min=1.0, help="seconds between checkpoints; with it also one at the end")
    ] = None,
    checkpoint_files: Annotated[
        str | None, typer.Option(help="folder, or URL of fsspec, to which checkpoints go as well")
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="if Redis has lost the job, go on from the newest of these files")
    ] = False,
    log_json: _LogJson = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="folder for TensorBoard: loss, learning rate, norm, speed, recoveries")
    ] = None,
) -> None:
    """Train: start workers and servers on this machine, watch them, restart what dies. Running it again resumes.

    Uses the Redis and ZooKeeper of PSA_REDIS and PSA_ZOOKEEPER (or of psa.toml, see `psa config show`); where these
    are unset, the ones of `psa up` or private ones that end with the run. Their data stay in PSA_HOME.

    Example: psa run --workers 2 --servers 1 train.py --steps 2000
    """
    from psa_store.cli.run import RunOptions, run_job

    settings = _begin("run", log_json=log_json)
    said = {
        "checkpoint_every_s": checkpoint_every,
        "checkpoint_files": checkpoint_files,
        "restore": restore or None,
        "tensorboard": tensorboard,
    }
    settings = settings.model_copy(update={name: value for name, value in said.items() if value is not None})
    options = RunOptions(
        script=_script(script),
        arguments=tuple(context.args),
        workers=workers,
        servers=servers,
        ranks=ranks,
        restarts_max=max_restarts,
        commit_every=commit_every,
        mode=None if mode is None else parse_mode(mode),
        compression=None if compress is None else parse_compression(compress),
        skip_nonfinite=skip_nonfinite,
    )
    raise typer.Exit(run_job(options, settings))


@app.command()
def server(job: Annotated[str, typer.Option(help="name of the job to serve")], log_json: _LogJson = False) -> None:
    """Serve shards of a job until SIGTERM; then hand them over and exit. May join and leave at any time.

    Example: PSA_REDIS=redis://db:6379 PSA_ZOOKEEPER=zk1:2181,zk2:2181 PSA_BIND=10.0.0.7 psa server --job demo
    """
    from psa_store.server import serve

    serve(job, _begin("server", log_json=log_json))


@app.command(context_settings=_SCRIPT)
def worker(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="training script; what follows it are its arguments")],
    log_json: _LogJson = False,
) -> None:
    """Run a training script as one more worker of its job. May join and leave at any time.

    Example: PSA_REDIS=redis://db:6379 PSA_ZOOKEEPER=zk1:2181,zk2:2181 psa worker train.py --steps 2000
    """
    from psa_store.cli.run import run_script

    os.environ.update(
        as_environment(_begin("worker", log_json=log_json))
    )  # the script reads them again, maybe in another directory
    run_script(str(_script(script)), context.args)


@app.command(context_settings=_SCRIPT)
def estimate(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="training script; what follows it are its arguments")],
    workers: Annotated[int, typer.Option(min=1, help="worker processes")] = 2,
    servers: Annotated[int, typer.Option(min=1, help="server processes")] = 1,
    ranks: Annotated[int | None, typer.Option(min=1, help="world size [default: --workers]")] = None,
    compute_ms: Annotated[
        float | None, typer.Option(min=0, help="forward and backward of a step, to add [default: unknown]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Tell what a job would take: shards, bytes a step sends, memory of Redis, and time, from speeds measured here.

    Runs the script up to its psa.Worker and stops it there; nothing is trained or stored, and neither Redis nor
    ZooKeeper is needed. Where Redis is known, 32 MiB are moved through it in keys of their own, as `psa doctor` does.
    Mode, compression and the like are those of the script, of PSA_MODE, PSA_COMPRESS, … and of psa.toml, as for
    `psa run`.

    Example: psa estimate --workers 8 --servers 2 train.py --layers 12
    """
    from psa_store.cli.estimate import Options, show_estimate

    show_estimate(
        Options(_script(script), tuple(context.args), workers, servers, ranks, compute_ms, as_json), _begin("estimate")
    )


@app.command()
def up(
    ensemble: Annotated[int, typer.Option(help="ZooKeeper nodes: 1 or 3")] = 1,
) -> None:
    """Start a private Redis and ZooKeeper in the background; `psa down` stops them, their data stay in PSA_HOME."""
    from psa_store.launch import up as start

    if ensemble not in (1, 3):
        raise UsageError(f"--ensemble {ensemble}: use 1 or 3")
    settings = _begin("up")
    addresses = start(settings.home, ensemble)
    typer.echo(f"export PSA_REDIS={addresses.redis}\nexport PSA_ZOOKEEPER={addresses.zookeeper}")


@app.command()
def down() -> None:
    """Stop the private Redis and ZooKeeper that `psa up` started. Data stay."""
    from psa_store.launch import down as stop

    settings = _begin("down")
    typer.echo("stopped" if stop(settings.home) else f"nothing is running in {settings.home}")


@app.command()
def status(
    job: Annotated[str | None, typer.Argument(help="name of the job [default: all jobs, one line each]")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="look again every second, until Ctrl-C")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs; with --watch, one document a line")] = False,
) -> None:
    """Show how a job is: its members, what they own and compute, stored versions, Redis and ZooKeeper.

    What is sick comes first, each with the command that looks further. Exits with 3 if Redis or ZooKeeper is away, and
    then shows what the other one knows; with 4 if stored data are damaged.

    Example: psa status shakespeare --watch
    """
    from psa_store.cli.status import show, watch_job

    settings = _settings()  # nothing is logged here, and structlog takes as long to import as all the rest
    raise typer.Exit(watch_job(job, as_json, settings) if watch else show(job, as_json, settings))


@app.command()
def report(
    job: Annotated[str, typer.Argument(help="name of the job")],
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
    from psa_store.cli.report import report as tell

    tell(job, out, as_json, _reach("report"))


config_app = typer.Typer(help="Settings: from flags, else PSA_* variables, else psa.toml, else defaults.")
app.add_typer(config_app, name="config")


@config_app.command("show")
def config_show(
    origin: Annotated[bool, typer.Option("--origin", help="also where each value comes from")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Show each setting, its value and its meaning. Passwords are hidden.

    psa.toml is the one in the current directory, or the file that PSA_CONFIG names. Its keys are the names shown here.

    Example: psa config show --origin
    """
    from psa_store.cli.config import show

    show(origin, as_json, _begin("config"))


@app.command()
def doctor(
    job: Annotated[str | None, typer.Argument(help="job whose versions must fit into Redis [default: none]")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Check this machine, Redis and ZooKeeper: versions, durability, memory, quorum, speed; and say how to mend them.

    Takes seconds, changes nothing, and may be run beside a job: it moves 32 MiB through Redis where there is room, in
    keys of its own that it removes. Exits with 3 if anything is unfit.

    Example: PSA_REDIS=redis://db:6379 PSA_ZOOKEEPER=zk1:2181,zk2:2181,zk3:2181 psa doctor shakespeare
    """
    from psa_store.cli.doctor import examine

    raise typer.Exit(examine(job, as_json, _begin("doctor")))


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
    json: Annotated[Path | None, typer.Option(help="file for all figures")] = None,
    png: Annotated[Path | None, typer.Option(help="file for a picture; needs matplotlib")] = None,
) -> None:
    """Measure a step (push, reduction, update, pull; nothing is computed) beside peers and the limits of this machine.

    All take turns in one run, on the same gradients, and prove their result. Uses a private Redis and ZooKeeper.
    With three numbers of workers or more it also prints what an added worker costs.

    Example: psa bench --json bench.json --png bench.png
    Example: psa bench --workers 2,3,4,6,8 --no-peers
    """
    from psa_store.cli.bench import compare, numbers

    _begin("bench")
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
    compare(wanted, json, png)


checkpoint_app = typer.Typer(
    help="Versions that are kept: take, compare, check, go back to, fork, remove, move to files. "
    "WHAT is the name of a checkpoint, or the number of a version that is still stored."
)
app.add_typer(checkpoint_app, name="checkpoint")

_Job = Annotated[str, typer.Argument(help="name of the job")]
_What = Annotated[str, typer.Argument(help="a checkpoint, or the number of a version")]
_Json = Annotated[bool, typer.Option("--json", help="for programs")]
_Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]


@checkpoint_app.command("save")
def checkpoint_save(
    job: _Job,
    name: Annotated[
        str | None, typer.Option(help="keep it under this name until it is pruned [default: the time, and retention]")
    ] = None,
    timeout: Annotated[float, typer.Option(min=1.0, help="seconds that it may take")] = 600.0,
) -> None:
    """Take a checkpoint now, while the job goes on; of a job that rests, keep its newest version.

    Example: psa checkpoint save shakespeare --name before-lr-change
    """
    from psa_store.cli import checkpoint

    checkpoint.save(job, name, timeout, _reach("checkpoint"))


@checkpoint_app.command("ls")
def checkpoint_ls(job: _Job, as_json: _Json = False) -> None:
    """List checkpoints, oldest version first, and the versions that training keeps.

    Example: psa checkpoint ls shakespeare
    """
    from psa_store.cli import checkpoint

    checkpoint.ls(job, as_json, _reach("checkpoint"))


@checkpoint_app.command("show")
def checkpoint_show(job: _Job, what: _What, as_json: _Json = False) -> None:
    """Tell all about a checkpoint: when and why it was taken, how large its parts are, what the job is.

    Example: psa checkpoint show shakespeare before-lr-change
    """
    from psa_store.cli import checkpoint

    checkpoint.show(job, what, as_json, _reach("checkpoint"))


@checkpoint_app.command("verify")
def checkpoint_verify(
    job: _Job,
    what: Annotated[str | None, typer.Argument(help="a checkpoint, or a version [default: all of both]")] = None,
) -> None:
    """Read every byte and compare digests; exits with 4 if anything is damaged.

    Example: psa checkpoint verify shakespeare
    """
    from psa_store.cli import checkpoint

    checkpoint.verify(job, what, _reach("checkpoint"))


@checkpoint_app.command("diff")
def checkpoint_diff(
    job: _Job,
    a: _What,
    b: _What,
    of: Annotated[str | None, typer.Option(help="the job whose B is meant, such as a fork [default: JOB]")] = None,
    as_json: _Json = False,
) -> None:
    """Show how far each parameter moved from A to B: norm, largest element, cosine.

    Example: psa checkpoint diff shakespeare before-lr-change 2000
    """
    from psa_store.cli import checkpoint

    checkpoint.diff(job, a, b, of, as_json, _reach("checkpoint"))


@checkpoint_app.command("rollback")
def checkpoint_rollback(job: _Job, what: _What, yes: _Yes = False) -> None:
    """Return to a checkpoint or an older version. A job that runs goes on from there; checkpoints stay.

    Example: psa checkpoint rollback shakespeare before-lr-change --yes
    """
    from psa_store.cli import checkpoint

    checkpoint.rollback(job, what, yes, _reach("checkpoint"))


@checkpoint_app.command("fork")
def checkpoint_fork(
    job: _Job, what: _What, new: Annotated[str, typer.Option("--as", help="name of the new job")]
) -> None:
    """Begin another job with a checkpoint of this one. Nothing is copied: both share what is stored.

    Example: psa checkpoint fork shakespeare before-lr-change --as hamlet
    """
    from psa_store.cli import checkpoint

    checkpoint.fork(job, what, new, _reach("checkpoint"))


@checkpoint_app.command("export")
def checkpoint_export(
    job: _Job,
    url: Annotated[str, typer.Argument(help="new folder: a path, or file://, s3://, hdfs://, … as fsspec knows them")],
    what: Annotated[str | None, typer.Argument(help="a checkpoint, or a version [default: the newest version]")] = None,
    max_file_gb: Annotated[float, typer.Option(min=0.001, help="size beyond which a file is split (10^9 bytes)")] = 5.0,
) -> None:
    """Write a checkpoint to files: safetensors with the names of state_dict, and all that a job needs to go on.

    Example: psa checkpoint export shakespeare s3://models/shakespeare-1 before-lr-change
    """
    from psa_store.cli.transfer import export_files

    export_files(job, what, url, _reach("checkpoint"), int(max_file_gb * 1e9))


@checkpoint_app.command("import")
def checkpoint_import(
    url: Annotated[str, typer.Argument(help="folder that `psa checkpoint export` wrote")],
    job: Annotated[str, typer.Option("--as", help="name of the new job")],
    ranks: Annotated[int | None, typer.Option(min=1, help="another world size [default: as exported]")] = None,
    shard_bytes: Annotated[
        int | None, typer.Option(min=4096, help="another shard size, that of the script [default: as exported]")
    ] = None,
) -> None:
    """Begin a job with an export. Its files are checked first; run the same script with this job name.

    Example: psa checkpoint import s3://models/shakespeare-1 --as hamlet --ranks 8
    """
    from psa_store.cli.transfer import import_files

    import_files(url, job, _reach("checkpoint"), ranks, shard_bytes)


@checkpoint_app.command("prune")
def checkpoint_prune(
    job: _Job,
    names: Annotated[list[str] | None, typer.Argument(help="checkpoints to remove")] = None,
    keep: Annotated[int | None, typer.Option(min=0, help="of those without a name, keep the newest so many")] = None,
    older_than: Annotated[float | None, typer.Option(min=0.0, help="of those, remove what is older (seconds)")] = None,
    yes: _Yes = False,
) -> None:
    """Remove checkpoints, and free what nothing else needs. Those with a name go only when they are named here.

    Example: psa checkpoint prune shakespeare --keep 2 --yes
    """
    from psa_store.cli import checkpoint

    checkpoint.prune(job, names or [], keep, older_than, yes, _reach("checkpoint"))


chaos_app = typer.Typer(
    help="Prove the promises: train while nodes are killed, paused and cut off. From a checkout only."
)
app.add_typer(chaos_app, name="chaos")


@chaos_app.command("run")
def chaos_run(
    scenario: Annotated[str, typer.Option(help="NAME, or several separated by commas, all, or soak")] = "soak",
    seed: Annotated[int, typer.Option(help="the same seed gives the same fault schedule")] = 0,
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
    from psa_store.cli.chaos import Options, run_chaos

    _begin("chaos")
    run_chaos(Options(scenario, range(seed, seed + seeds), duration, every, out, keep))


@chaos_app.command("list")
def chaos_list() -> None:
    """Name every scenario and its faults."""
    from psa_store.cli.chaos import list_scenarios

    list_scenarios()


def main() -> None:
    """Entry point: run a command, and turn errors into one line and an exit code."""
    try:
        app(standalone_mode=True)
    except PsaError as error:
        logs.complain(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)


def _begin(role: str, *, log_json: bool = False) -> Settings:
    settings = _settings()
    if log_json:
        settings = settings.model_copy(update={"log_json": True})
    logs.configure(settings.log_level, role, as_json=settings.log_json)
    return settings


def _reach(role: str) -> Settings:
    """The same with the addresses of Redis and ZooKeeper: those of the settings, or of the private ones that run."""
    from psa_store.launch import fill_addresses

    return fill_addresses(_begin(role))


def _settings() -> Settings:
    check_environment()
    return load_settings()


def _script(script: Path) -> Path:
    if not script.is_file():
        raise UsageError(f"no script {script}")
    return script
