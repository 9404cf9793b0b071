"""A job under test: its processes, started as users start them, and again after the harness has killed them."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import psutil

from chaos.cluster.spawner import Process
from chaos.site import SERVERS_HOSTED, SERVERS_SUPERVISED, SESSION_TIMEOUT_S, WORKERS, Site
from psa_store.job.mode import parse_mode
from psa_store.launch.guard import die_with_parent

TRAIN = Path(__file__).with_name("train.py")
STAGED = Path(__file__).with_name("staged.py")
_ROOT = str(TRAIN.parents[1])
"""What scripts import from."""
_RANKS = 3
_RANKS_STAGED = 2
"""With four stages each worker holds cells of both, and no worker holds a whole one."""
_END_S = 20.0
_UNDISTURBED_S = 3600.0
_RETRYABLE_EXIT = 3
_KEY = secrets.token_hex(16)
"""Servers of hosts do not start without one."""


@dataclass(frozen=True, slots=True)
class JobSpec:
    """A job to train, and the folder of its traces."""

    name: str
    steps: int
    pace_s: float
    folder: Path
    env: Mapping[str, str] = field(default_factory=dict)
    commit_every: int = 10
    stages: int = 1
    mode: str = "sync"

    @property
    def last_version(self) -> int:
        """The version with which the job ends."""
        mode = parse_mode(self.mode)
        return self.steps * self.ranks if mode.on_arrival else self.steps // mode.round_steps

    @property
    def ranks(self) -> int:
        return _RANKS if self.stages == 1 else _RANKS_STAGED

    @property
    def script(self) -> Path:
        return TRAIN if self.stages == 1 else STAGED

    @property
    def journals(self) -> Path:
        return self.folder / "journals"

    @property
    def failpoints(self) -> Path:
        return self.folder / "failpoints"

    @property
    def log(self) -> Path:
        return self.folder / "output.log"

    @property
    def calm(self) -> Path:
        """A file whose existence ends the pace: no more faults will come."""
        return self.folder / "calm"

    @property
    def script_arguments(self) -> list[str]:
        return [
            "--job",
            self.name,
            "--steps",
            str(self.steps),
            "--pace-s",
            str(self.pace_s),
            "--paced-until",
            str(self.calm),
            *self._cut,
        ]

    @property
    def _cut(self) -> list[str]:
        if self.stages == 1:
            return []
        return ["--stages", str(self.stages), "--microbatches", "2", "--tied", "--dropout", "0.1", "--clip", "1.0"]

    def environment(self, site: Site) -> dict[str, str]:
        return {
            "PSA_REDIS": site.redis_url,
            "PSA_ZOOKEEPER": site.zookeeper_hosts,
            "PSA_HOME": str(self.folder),
            "PSA_SESSION_TIMEOUT_S": str(SESSION_TIMEOUT_S),
            "PSA_JOURNAL": str(self.journals),
            "PSA_FAILPOINTS": str(self.failpoints),
            "PSA_COMMIT_EVERY": str(self.commit_every),
            "PSA_RANKS": str(self.ranks),
            "PSA_MODE": self.mode,
            "PSA_KEY": _KEY,
            "PSA_CONFIG": "",
            "PYTHONPATH": os.pathsep.join(filter(None, (_ROOT, os.environ.get("PYTHONPATH")))),
            **self.env,
        }


class Job(Protocol):
    """A job, in whatever way its processes are run."""

    def start(self) -> None:
        """Start it, or start it again: the same command resumes."""

    def poll(self) -> int | None:
        """Restart dead processes that no supervisor restarts; return the exit code once the job has ended."""

    def kill(self) -> None:
        """SIGKILL all its processes at once."""

    def main_pid(self) -> int | None:
        """Return the process that supervises the others, if there is one."""

    def kill_main(self) -> list[psutil.Process]:
        """SIGKILL that process alone; return its orphans. Start the job again afterwards."""


class SupervisedJob:
    """`psa run`: its own supervisor restarts what dies."""

    def __init__(self, spec: JobSpec, site: Site, workers: int = WORKERS, servers: int = SERVERS_SUPERVISED) -> None:
        self._spec = spec
        self._site = site
        self._arguments = ["--workers", str(workers), "--servers", str(servers), "--max-restarts", "100000"]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start from the main thread only: the job dies with the thread that starts it."""
        command = [sys.executable, "-m", "psa_store.cli", "run", *self._arguments]
        with self._spec.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, str(self._spec.script), *self._spec.script_arguments],
                env={**os.environ, **self._spec.environment(self._site)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=partial(die_with_parent, signal.SIGKILL),
            )

    def poll(self) -> int | None:
        return self._process.poll() if self._process is not None else None

    def wait(self) -> int:
        """Wait for the end of an undisturbed job; return its exit code."""
        assert self._process is not None
        return self._process.wait(_UNDISTURBED_S)

    def kill(self) -> None:
        if self._process is None:
            return
        for pid in session_of(self._process.pid):
            signal_if_alive(pid, signal.SIGKILL)
        self._process.wait(_END_S)
        self._process = None

    def main_pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def kill_main(self) -> list[psutil.Process]:
        assert self._process is not None
        pids = [pid for pid in session_of(self._process.pid) if pid != self._process.pid]
        children = [each for each in psutil.process_iter() if each.pid in pids]
        self._process.kill()
        self._process.wait(_END_S)
        self._process = None
        return children


class HostedJob:
    """Each process on its own host, as under an orchestrator that restarts dead processes and does nothing else."""

    def __init__(self, spec: JobSpec, site: Site) -> None:
        self._spec = spec
        self._site = site
        self._processes: dict[str, Process] = {}
        self._done: set[str] = set()

    def start(self) -> None:
        for name in (*(f"server{i}" for i in range(SERVERS_HOSTED)), *(f"worker{i}" for i in range(WORKERS))):
            if name not in self._done:
                self._start(name)

    def poll(self) -> int | None:
        for name, process in list(self._processes.items()):
            code = process.poll()
            if code is None:
                continue
            del self._processes[name]
            if code < 0 or code == _RETRYABLE_EXIT:
                self._start(name)
            elif code == 0:
                self._done.add(name)
            else:
                return code
        if any(name.startswith("worker") for name in self._processes):
            return None
        return self._stop_servers()

    def kill(self) -> None:
        for process in self._processes.values():
            process.kill()
        for process in self._processes.values():
            process.wait(_END_S)
        self._processes.clear()

    def main_pid(self) -> int | None:
        return None

    def kill_main(self) -> list[psutil.Process]:
        raise NotImplementedError("these processes have no supervisor")

    def _start(self, name: str) -> None:
        host = self._site.host(name)
        self._processes[name] = start_role(self._site, self._spec, name, {"PSA_BIND": host.address}, host.namespace)

    def _stop_servers(self) -> int:
        for process in self._processes.values():
            process.terminate()
        codes = [process.wait(_END_S) for process in self._processes.values()]
        self._processes.clear()
        return max(map(abs, codes), default=0)


def start_role(site: Site, spec: JobSpec, name: str, env: Mapping[str, str], namespace: str | None = None) -> Process:
    """Start one more process of a job, without a supervisor; ``name`` begins with its role."""
    target, arguments = _entry(spec, name)
    merged = {**spec.environment(site), **env}
    return site.spawner.spawn(name, target, arguments, merged, namespace, spec.log)


def _entry(spec: JobSpec, name: str) -> tuple[str, Sequence[object]]:
    if name.startswith("server"):
        return "psa_store.launch.processes:server_main", [spec.name]
    return "psa_store.launch.processes:worker_main", [str(spec.script), spec.script_arguments]


def session_of(leader: int) -> list[int]:
    """Return the processes of a session; `psa run` and its children are one."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process.pid)
        except ProcessLookupError:
            pass
    return found


def signal_if_alive(pid: int, number: signal.Signals) -> bool:
    """Send a signal; return False if the process is gone."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
