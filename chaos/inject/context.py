"""What injectors share: the context of a run, the choice of a target, and proof that a process was hit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from chaos.cluster.spawner import Process as SpawnedProcess
from chaos.job import Job, JobSpec, signal_if_alive
from chaos.schedule import ScheduledFault
from chaos.site import Site
from chaos.tail import Process, Tail

FIRE_WITHIN_S = 120.0
"""How long a fault that waits for an event of the job may take to happen. It bounds a hang, on a busy machine."""
T = TypeVar("T")


class NotFired(Exception):
    """The fault could not be injected, or there is no evidence that it was."""


@dataclass(frozen=True, slots=True)
class Context:
    """The run into which faults are injected."""

    site: Site
    spec: JobSpec
    job: Job
    tail: Tail
    wait: Callable[[float], None]
    """Let the run go on for so many seconds; raises when the run exceeds its time."""
    until: Callable[[Callable[[], T | None], float, str], T]
    """Let the run go on until a value is there; raises NotFired with the text after so many seconds."""
    extra_processes: list[SpawnedProcess]
    """Processes that a fault has added to the job; they are ended after the run."""


Injector = Callable[[Context, ScheduledFault], AbstractContextManager[str]]


def choose(candidates: Sequence[T], fault: ScheduledFault, what: str) -> T:
    """Return the candidate that the schedule has picked."""
    if not candidates:
        raise NotFired(f"there was no {what} to choose")
    return candidates[int(fault.pick * len(candidates))]


def living(context: Context, role: str) -> list[Process]:
    """Return the processes of a role; wait for one, because an earlier fault may have just killed them."""

    def look() -> list[Process] | None:
        context.tail.look()
        return context.tail.living(role) or None

    return context.until(look, FIRE_WITHIN_S, f"no {role} was alive")


def controller(context: Context) -> Process:
    """Return the controller; wait for one."""

    def look() -> Process | None:
        context.tail.look()
        return context.tail.controller()

    return context.until(look, FIRE_WITHIN_S, "no controller was alive")


def kill(pids: Sequence[int]) -> str:
    """SIGKILL processes; return the evidence."""
    killed = [pid for pid in pids if signal_if_alive(pid, signal.SIGKILL)]
    if not killed:
        raise NotFired(f"the processes {list(pids)} had ended already")
    return f"SIGKILL to {killed}"


@contextmanager
def stopped(pids: Sequence[int]) -> Iterator[str]:
    """SIGSTOP processes, and SIGCONT them on leaving."""
    try:
        if not [pid for pid in pids if signal_if_alive(pid, signal.SIGSTOP)]:
            raise NotFired(f"the processes {list(pids)} had ended already")
        yield f"SIGSTOP to {list(pids)}"
    finally:
        for pid in pids:
            signal_if_alive(pid, signal.SIGCONT)


@contextmanager
def alternating(on: Callable[[], object], off: Callable[[], object], on_s: float, off_s: float) -> Iterator[None]:
    """Turn a fault on and off in a thread; off on leaving."""
    ended = threading.Event()

    def alternate() -> None:
        while not ended.is_set():
            on()
            ended.wait(on_s)
            off()
            ended.wait(off_s)

    with ThreadPoolExecutor(1, thread_name_prefix="chaos-alternating") as pool:
        future = pool.submit(alternate)
        try:
            yield
        finally:
            ended.set()
            future.result()
