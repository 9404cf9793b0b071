"""Injects the faults of a schedule into members that meet at barriers."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from chaos.barrier.check import CALM_BARRIERS
from chaos.barrier.member import CONNECT_S, MEMBERS, SESSION_S, opened_by
from psa_store.cluster import ProcessRole
from psa_store.coordination import BarrierState, Coordination
from psa_store.testing import failpoints
from psa_store.testing.failpoints import FAILPOINTS, FailpointAction
from psa_store.testing.journal import Journal

KILL_ALL = "kill-all"
FAULT_KINDS = (
    *(f"{how}-{name}" for how in ("die", "hang") for name in FAILPOINTS if name.startswith("barrier.")),
    KILL_ALL,
)
"""Death or a pause at every failpoint, and the death of all members just after they passed."""
_HANG_S = (0.2, 3.0)
"""Around the session timeout and the members' patience."""
_WAIT_S = 120.0
"""Bounds a hang. A member that was killed has to start anew before a barrier can succeed, on a busy machine."""
_LOOK_S = 0.01


def schedule_of(seed: int) -> list[str]:
    """Return every kind of fault once, in an order drawn from the seed."""
    return random.Random(f"barrier/{seed}").sample(FAULT_KINDS, len(FAULT_KINDS))


def drill(
    hosts: str, job: str, folder: Path, seed: int, schedule: Sequence[str], env: Mapping[str, str] | None = None
) -> Path:
    """Let members meet under a fault schedule; return the folder of their journals.

    Args:
        env: added to the members' environment.
    """
    journals, armed = folder / "journals", folder / "failpoints"
    for each in (journals, armed):
        each.mkdir(parents=True)
    with closing(_Drill(hosts, job, journals, armed, env or {})) as running:
        running.play(schedule, random.Random(f"barrier/{seed}/pauses"))
    return journals


class _Drill:
    def __init__(self, hosts: str, job: str, journals: Path, armed: Path, env: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-m", "chaos.barrier.member", job]
        self._journals, self._armed = journals, armed
        root = str(Path(__file__).parents[2])
        paths = os.pathsep.join(filter(None, [env.get("PYTHONPATH"), root, os.environ.get("PYTHONPATH")]))
        self._env = {**os.environ, **env, "PYTHONPATH": paths, failpoints.ENV: str(armed)}
        self._env["PSA_ZOOKEEPER"] = hosts
        self._news = threading.Event()
        self._door = Coordination(
            hosts, job, session_timeout_s=SESSION_S, connect_timeout_s=CONNECT_S, wake=self._news.set
        )
        self._journal = Journal(journals, "harness", "0")
        self._names = itertools.count()
        self._members: dict[str, tuple[int, subprocess.Popen[bytes]]] = {}
        """Name -> slot and process."""
        self._newest = -1
        """The newest barrier that has succeeded."""

    def play(self, schedule: Sequence[str], pauses: random.Random) -> None:
        self._door.start()
        for slot in range(MEMBERS):
            self._spawn(slot)
        self._await_success()
        for kind in schedule:
            fired = self._kill_all() if kind == KILL_ALL else self._inject(kind, pauses.uniform(*_HANG_S))
            self._journal.record("fault", kind=kind, fired=fired)
            if not self._await_success():
                break
        self._journal.record("calm")
        for _ in range(CALM_BARRIERS + 1):  # the first may have succeeded before it was calm
            self._await_success()

    def close(self) -> None:
        for _, process in self._members.values():
            process.kill()
            process.wait()
        self._door.close()
        self._journal.close()

    def _inject(self, kind: str, pause_s: float) -> bool:
        how, _, name = kind.partition("-")
        failpoints.arm(self._armed, name, FailpointAction.KILL if how == "die" else FailpointAction.STOP)
        if not self._until(lambda: self._is_hit(name)):
            return not failpoints.disarm(self._armed, name)
        (pid,) = failpoints.hit(self._armed, name)
        if how == "die":
            return self._until(lambda: self._is_replaced(pid))
        threading.Event().wait(pause_s)  # the fault is that it lasts
        os.kill(pid, signal.SIGCONT)
        return True

    def _kill_all(self) -> bool:
        if not self._await_success():
            return False
        for _, process in self._members.values():
            process.kill()
        for _, process in self._members.values():
            process.wait()
        return self._replace_dead()

    def _is_hit(self, name: str) -> bool:
        """A member that slept through its session, on a busy machine, has ended: the rest waits for its successor."""
        if failpoints.hit(self._armed, name):
            return True
        self._replace_dead()
        return False

    def _is_replaced(self, pid: int) -> bool:
        self._replace_dead()
        return all(process.pid != pid for _, process in self._members.values())

    def _replace_dead(self) -> bool:
        """Replace dead members, as a supervisor does; return whether there were any."""
        dead = {name: slot for name, (slot, process) in self._members.items() if process.poll() is not None}
        for name, slot in dead.items():
            del self._members[name]
            self._door.remove(ProcessRole.SERVER, name)
            self._spawn(slot)
        return bool(dead)

    def _spawn(self, slot: int) -> None:
        name = f"m{next(self._names)}"
        command = [*self._command, name, str(slot), str(self._journals)]
        self._members[name] = (slot, subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL))

    def _until(self, holds: Callable[[], bool]) -> bool:
        end_s = time.monotonic() + _WAIT_S
        while not holds():
            if time.monotonic() > end_s:
                return False
            threading.Event().wait(_LOOK_S)  # files and processes send no events
        return True

    def _await_success(self) -> bool:
        """Wait for one more barrier to succeed; meanwhile members whose session expired are replaced."""
        end_s = time.monotonic() + _WAIT_S
        while time.monotonic() < end_s:
            self._news.clear()
            self._replace_dead()
            opened = opened_by(self._door.read_plan(watch=True))
            barrier = self._door.read_barrier(opened, watch=True) if opened is not None else None
            done = barrier is not None and barrier.state is BarrierState.DONE
            if opened is not None and done and int(opened) > self._newest:
                self._newest = int(opened)
                return True
            self._news.wait(0.1)  # and replace the dead
        return False
