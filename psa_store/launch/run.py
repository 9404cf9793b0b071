"""One job on one machine, from private servers to the last commit: `psa run`."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from typing import Any

from psa_store import logs
from psa_store.checkpoint.catalog import read_job
from psa_store.cluster import ProcessRole
from psa_store.config import Settings, as_environment, check_bind, fill_addresses, running
from psa_store.config.private_servers import with_addresses, with_private_key
from psa_store.coordination import Coordination, SessionState
from psa_store.errors import DependencyUnreachable, JobBusy, PsaError, UsageError
from psa_store.job.config import RUN_NODE
from psa_store.launch.home import HomeServers
from psa_store.launch.output import Output
from psa_store.launch.processes import Program, module_main, server_main, worker_main
from psa_store.launch.supervisor import Child, Supervisor
from psa_store.observe.tensorboard import BoardWriter, check_tensorboard
from psa_store.storage import RedisStore, known_redis

_LEAVE_S = 60.0
_HOLD_POLL_S = 0.1
_HOLD_GRACE_S = 2.0


@dataclass(frozen=True, slots=True)
class Run:
    """The processes that are wanted: a program with its arguments in so many workers, and servers beside them."""

    program: Program
    arguments: tuple[str, ...]
    workers: int
    servers: int
    restarts_max: int
    label: bool
    """Whether lines say whose they are."""


def run_job(run: Run, settings: Settings) -> int:
    """Run a script's job to its end, or until SIGTERM or SIGINT; returns the exit code of the command.

    Raises:
        DependencyUnreachable: Redis or ZooKeeper does not answer, or cannot be started.
        JobBusy: the job runs already.
    """
    with ExitStack() as stack:
        private = _private_servers(settings, run.restarts_max, stack)
        if private:
            settings = with_private_key(with_addresses(settings, private.start()))
        else:
            settings = fill_addresses(settings)
        _check(settings, private)
        job = stack.enter_context(closing(_RunningJob(settings)))
        if settings.tensorboard is not None:
            check_tensorboard()
        logs.entitle("supervisor")
        output = _output(run, settings)
        if output is not None:
            stack.callback(output.close)
        # Read when the fork server starts: sets of strings have the same order in all workers, and after a resume.
        os.environ.setdefault("PYTHONHASHSEED", "0")
        supervisor = Supervisor(
            preload=["psa_store.launch.preload"],
            restarts_max=run.restarts_max,
            env=environment_of(settings, job.run_id, run.workers),
            on_exit=job.report_death,
            on_message=lambda message: take_message(message),
            output=output,
        )
        stack.callback(supervisor.close)

        def start_servers(name: str) -> None:
            if job.take(name):
                if settings.tensorboard is not None:
                    board = BoardWriter(name, settings.tensorboard, known_redis(settings), settings.connect_timeout_s)
                    stack.enter_context(closing(board))
                for _ in range(run.servers):
                    supervisor.spawn(ProcessRole.SERVER, server_main, name)

        def take_message(message: dict[str, Any]) -> None:
            if isinstance(message.get("job"), str):
                start_servers(message["job"])

        def finished() -> bool:
            if private is not None:
                private.mend()
            if output is not None and output.broken:
                logs.get_logger().warning("nothing takes what the run prints any more: leaving")
                return True
            job.keep()
            return not supervisor.alive(ProcessRole.WORKER)

        for _ in range(run.workers):
            main = module_main if run.program.is_module else worker_main
            supervisor.spawn(ProcessRole.WORKER, main, run.program.name, run.arguments)
        code = supervisor.run(until=finished)
        if supervisor.failure is not None:
            logs.complain(
                f"run: the script failed in the same way again, or too often: {supervisor.failure}. Its traceback is "
                "above. When that is mended, the same command resumes the job"
            )
        # Workers first: they finish the step that they are in, which needs the servers.
        left = [supervisor.stop(role, _LEAVE_S) for role in (ProcessRole.WORKER, ProcessRole.SERVER)]
        stopped = code != 0 or (output is not None and output.broken)
        if max(left) == 0 and code in (0, 128 + signal.SIGTERM, 128 + signal.SIGINT):
            job.say_last("stopped: the same command goes on from here" if stopped else "finished")
        if code == 128 + signal.SIGTERM:
            return max(left)
        return code if code != 128 + signal.SIGINT else 130


class _RunningJob:
    """Our hold on the job in ZooKeeper: one run at a time, and deaths are reported the moment they are seen."""

    def __init__(self, settings: Settings) -> None:
        self.run_id = secrets.token_hex(8)
        self._text = f"{self.run_id} pid {os.getpid()}"
        self._settings = settings
        self._name: str | None = None
        self._coordination: Coordination | None = None
        self._changed = threading.Event()
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
        self._coordination = Coordination.from_settings(self._settings, name, wake=self._changed.set)
        self._coordination.start()
        self._hold(self._coordination)
        return True

    def report_death(self, child: Child) -> None:
        """Tell ZooKeeper now what it would find out only when the session of the dead process ends."""
        if self._coordination is None:
            return
        try:
            self._coordination.remove(child.role, child.member)
            self._hold_again(self._coordination)  # before it is started again: it waits until we hold the job
        except DependencyUnreachable as error:
            self._log.warning("could not report a death, its session will end by itself", error=str(error))

    def keep(self) -> None:
        """Hold the job again if our session expired, or another process wrote over what shows that we hold it."""
        coordination = self._coordination
        if coordination is None or not self._changed.is_set():
            return
        if coordination.session_state is SessionState.CONNECTED:
            self._changed.clear()
            try:
                self._hold_again(coordination)
            except DependencyUnreachable as error:
                self._log.warning("could not hold the job", error=str(error))
                self._changed.set()

    def say_last(self, what: str) -> None:
        """Say how the run ended, and which version of its job is durable. Nothing if it named no job."""
        if self._name is None:
            return
        version = None
        with (
            suppress(PsaError),  # it has ended all the same
            closing(RedisStore.from_settings(self._settings)) as store,
        ):
            version = read_job(store, self._name).version_of(None)
        self._log.info(what, version=version)

    def _hold_again(self, coordination: Coordination) -> None:
        holder = coordination.hold(RUN_NODE, self._text)
        if holder is not None:
            self._log.warning("another run holds the job: what dies here cannot be started again", holder=holder)

    def _hold(self, coordination: Coordination) -> None:
        # A run that was killed with everything holds the job until its session ends.
        end_s, waits = time.monotonic() + 2 * self._settings.session_timeout_s + _HOLD_GRACE_S, logs.Waits()
        while (holder := coordination.hold(RUN_NODE, self._text)) is not None:
            if time.monotonic() > end_s:
                raise JobBusy(
                    f"job {self._name!r} is running already ({holder.partition(' ')[2]}). "
                    "Add to it with `psa worker` or `psa server`, or use another job name."
                )
            waits.on("run", f"a former run of job {self._name!r} to be gone", holder.partition(" ")[2])
            time.sleep(_HOLD_POLL_S)
        waits.over("run")


def _private_servers(settings: Settings, restarts_max: int, stack: ExitStack) -> HomeServers | None:
    """The private servers of the home, if no others are known."""
    if settings.redis is not None and settings.zookeeper is not None:
        return None
    if (settings.redis is not None or settings.zookeeper is not None) and running(settings.home) is None:
        raise UsageError("set both PSA_REDIS and PSA_ZOOKEEPER (in psa.toml: redis, zookeeper), or none of them")
    return stack.enter_context(closing(HomeServers(settings.home, restarts_max)))


def _output(run: Run, settings: Settings) -> Output | None:
    """Where the lines of processes go; None if they need no help to go where ours do."""
    label = run.label and not settings.log_json  # a line for programs says by itself whose it is
    if settings.log_dir is not None:
        logs.get_logger().info("what each process prints is kept", files=f"{settings.log_dir}/worker-1.log, …")
    return Output(label=label, folder=settings.log_dir) if label or settings.log_dir is not None else None


def _check(settings: Settings, private: HomeServers | None) -> None:
    """Fail now, with one error, and not later in every process."""
    check_bind(settings)
    try:
        _reach(settings)
    except DependencyUnreachable:
        if private is None or not private.mend():
            raise
        _reach(settings)  # the process that ran them has just ended


def _reach(settings: Settings) -> None:
    with RedisStore.from_settings(settings) as store:
        store.check()
        store.rehearse()
    with Coordination.from_settings(settings, "check") as coordination:
        coordination.rehearse()


def environment_of(settings: Settings, run_id: str, workers: int) -> dict[str, str]:
    """What processes get: our settings, flags and addresses included, so that no file decides for them again."""
    return {**as_environment(settings), "PSA_RUN": run_id, "PSA_DEFAULT_RANKS": str(workers)}
