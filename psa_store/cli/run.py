"""`psa run`: everything of one job on one machine."""

from __future__ import annotations

import os
import runpy
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from psa_store.cli.options import SCRIPT, LogJson, Script, begin, check_script
from psa_store.compression import parse_compression
from psa_store.config import with_flags
from psa_store.job.mode import parse_mode

app = typer.Typer()


@app.command(context_settings=SCRIPT)
def run(
    context: typer.Context,
    script: Script,
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
    log_json: LogJson = False,
    tensorboard: Annotated[
        Path | None, typer.Option(help="folder for TensorBoard: loss, learning rate, norm, speed, recoveries")
    ] = None,
) -> None:
    """Train: start workers and servers on this machine, watch them, restart what dies. Running it again resumes.

    Uses the Redis and ZooKeeper of PSA_REDIS and PSA_ZOOKEEPER (or of psa.toml, see `psa config show`); where these
    are unset, the ones of `psa up` or private ones that end with the run. Their data stay in PSA_HOME.

    Example: psa run --workers 2 --servers 1 train.py --steps 2000
    """
    with ExitStack() as stack:
        private = _private_servers(settings, stack)
        addresses = private.addresses if private else _known_addresses(settings)
        settings = settings.model_copy(update={"redis": addresses.redis, "zookeeper": addresses.zookeeper})
        _check(settings)
        job = stack.enter_context(closing(_RunningJob(settings)))
        if settings.tensorboard is not None:
            check_tensorboard()
        supervisor = Supervisor(
            preload=["psa_store.cli.preload"],
            restarts_max=options.restarts_max,
            env=environment_of(options, settings, addresses, job.run_id),
            on_exit=job.report_death,
            on_message=lambda message: start_servers(message["job"]),
        )
        stack.callback(supervisor.close)

        def start_servers(name: str) -> None:
            if job.take(name):
                if settings.tensorboard is not None:
                    board = BoardWriter(name, settings.tensorboard, addresses.redis, settings.connect_timeout_s)
                    stack.enter_context(closing(board))
                for _ in range(options.servers):
                    supervisor.spawn(ProcessRole.SERVER, server_main, name)

        def finished() -> bool:
            if private is not None and not private.running:
                logs.get_logger().warning("a private server died: starting it again")
                private.start()
            return not supervisor.alive(ProcessRole.WORKER)

        for _ in range(options.workers):
            supervisor.spawn(ProcessRole.WORKER, worker_main, str(options.script), options.arguments)
        code = supervisor.run(until=finished)
        # Workers first: they finish the step that they are in, which needs the servers.
        left = [supervisor.stop(role, _LEAVE_S) for role in (ProcessRole.WORKER, ProcessRole.SERVER)]
        if code == 128 + signal.SIGTERM:
            return max(left)
        return code if code != 128 + signal.SIGINT else 130


class _RunningJob:
    """Our hold on the job in ZooKeeper: one run at a time, and deaths are reported the moment they are seen."""

    def __init__(self, settings: Settings) -> None:
        self.run_id = secrets.token_hex(8)
        self._settings = settings
        self._name: str | None = None
        self._coordination: Coordination | None = None
        self._generation = 0
        self._log = logs.get_logger()

    def close(self) -> None:
        if self._coordination is not None:
            self._coordination.close()

    def take(self, name: str) -> bool:
        """Hold the job that the first worker announced. False: we hold it already."""
        if self._name is not None:
            if name != self._name:
                raise UsageError(f"one `psa run` trains one job, but its workers named {self._name!r} and {name!r}")
            return False
        self._name = name
        logs.identify(job=name)
        self._coordination = Coordination.from_settings(self._settings, name)
        self._coordination.start()
        self._hold(self._coordination)
        return True

    def report_death(self, child: Child) -> None:
        """Tell ZooKeeper now what it would find out only when the session of the dead process ends."""
        if self._coordination is None:
            return
        try:
            self._coordination.remove(child.role, child.member)
            if self._coordination.session_generation() != self._generation:
                self._hold(self._coordination)
        except DependencyUnreachable as error:
            self._log.warning("could not report a death, its session will end by itself", error=str(error))

    def _hold(self, coordination: Coordination) -> None:
        # A run that was killed with everything holds the job until its session ends.
        end_s = time.monotonic() + 2 * self._settings.session_timeout_s + _HOLD_GRACE_S
        self._generation = coordination.session_generation()
        while (holder := coordination.hold(RUN_NODE, f"{self.run_id} pid {os.getpid()}")) is not None:
            if time.monotonic() > end_s:
                raise JobBusy(
                    f"job {self._name!r} is running already ({holder.partition(' ')[2]}). "
                    "Add to it with `psa worker` or `psa server`, or use another job name."
                )
            time.sleep(_HOLD_POLL_S)


def worker_main(script: str, arguments: Sequence[str]) -> None:
    """In a worker process: run the user's script."""
    _in_child("worker", lambda: run_script(script, arguments))


def server_main(job: str) -> None:
    """In a server process: serve the job."""
    from psa_store.server import serve

    _in_child("server", lambda: serve(job, load_settings()))


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python script arguments…`` would."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


def _in_child(role: str, work: Any) -> None:
    """Run the work of a child process; our errors end it with their code, others with a traceback and 1."""
    settings = load_settings()
    logs.configure(settings.log_level, role, as_json=settings.log_json)
    try:
        work()
    except PsaError as error:
        logs.complain(f"{role}: {error}")
        sys.exit(error.exit_code)
    except Exception:
        logs.complain(f"{role}: user code failed", with_traceback=True)
        sys.exit(1)


def _private_servers(settings: Settings, stack: ExitStack) -> PrivateServers | None:
    """Start private servers for this run, if no others are known."""
    if (settings.redis is not None and settings.zookeeper is not None) or running(settings.home) is not None:
        return None
    if settings.redis is not None or settings.zookeeper is not None:
        raise UsageError("set both PSA_REDIS and PSA_ZOOKEEPER (in psa.toml: redis, zookeeper), or none of them")
    let_go = hold_home(settings.home)
    if let_go is None:
        raise DependencyUnreachable(f"another process is starting private servers in {settings.home}: try again")
    stack.callback(let_go)
    servers = stack.enter_context(closing(PrivateServers(settings.home)))
    servers.start()
    publish(settings.home, servers.addresses)
    logs.get_logger().info("private Redis and ZooKeeper", home=str(settings.home))
    return servers


def _check(settings: Settings) -> None:
    """Fail now, with one error, and not later in every process."""
    with RedisStore.from_settings(settings) as store:
        store.check()
    with Coordination.from_settings(settings, "check"):
        pass


def _known_addresses(settings: Settings) -> Addresses:
    found = running(settings.home)
    redis = settings.redis or (found.redis if found else None)
    zookeeper = settings.zookeeper or (found.zookeeper if found else None)
    assert redis is not None and zookeeper is not None
    return Addresses(redis, zookeeper)


def environment_of(options: RunOptions, settings: Settings, addresses: Addresses, run_id: str) -> dict[str, str]:
    """What children get: our settings, and what flags say instead, so that no file decides for them again."""
    env = as_environment(settings)
    env |= {"PSA_REDIS": addresses.redis, "PSA_ZOOKEEPER": addresses.zookeeper, "PSA_RUN": run_id}
    env["PSA_DEFAULT_RANKS"] = str(options.workers)
    if options.ranks is not None:
        env["PSA_RANKS"] = str(options.ranks)
    if options.commit_every is not None:
        env["PSA_COMMIT_EVERY"] = str(options.commit_every)
    if options.mode is not None:
        env["PSA_MODE"] = str(options.mode)
    if options.compression is not None:
        env["PSA_COMPRESS"] = str(options.compression)
    if options.skip_nonfinite:
        env["PSA_SKIP_NONFINITE"] = "1"
    return env
