"""One run: a job trains while the faults of a schedule are injected; journals record all of it for the checker."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from chaos.inject import Context, NotFired, inject, prepare
from chaos.job import HostedJob, Job, JobSpec, SupervisedJob
from chaos.sampler import Sampler
from chaos.scenarios import Scenario, Shape
from chaos.schedule import REST_S, ScheduledFault
from chaos.site import SESSION_TIMEOUT_S, Site
from chaos.tail import Tail
from psa_store.errors import PsaError
from psa_store.testing.journal import Journal

_POLL_S = 0.01
_STILL_S = 120.0
"""How long a job may complete no step before it counts as hanging."""
_GRACE_S = 900.0
"""How long a run may take beyond what its steps take when nothing happens: the machine may have other work."""
_LOOK_S = 1.0
_FIRST_STEP_S = 240.0
_READER_END_S = 10.0
T = TypeVar("T")


class OutOfTime(Exception):
    """The job hangs, or progresses too slowly."""


class EndedEarly(Exception):
    """The job ended although faults were still to come, or it failed."""


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to do in one run."""

    scenario: Scenario
    seed: int
    schedule: Sequence[ScheduledFault]
    job: JobSpec
    replay: str


def run_once(run: RunSpec, site: Site) -> None:
    """Run a job under a fault schedule and leave its journals in ``run.job.journals``.

    What the job did wrong raises nothing: it is in the journals, for the checker.
    """
    spec = run.job
    for folder in (spec.folder, spec.journals, spec.failpoints):
        folder.mkdir(parents=True, exist_ok=True)
    site.repair()
    site.delete_jobs()
    job: Job = HostedJob(spec, site) if site.shape is Shape.HOSTS else SupervisedJob(spec, site)
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(spec.journals, "harness", "0")))
        journal.record(
            "scenario",
            name=run.scenario.name,
            seed=run.seed,
            steps=spec.last_version,
            mode=spec.mode,
            ranks=spec.ranks,
            stages=spec.stages,
            commit_every=spec.commit_every,
            supervised=site.shape is not Shape.HOSTS,
            session_timeout_s=SESSION_TIMEOUT_S,
            loses_redis=any(fault.traits.loses_data for fault in run.schedule),
            replay=run.replay,
        )
        runner = _Runner(run, site, job, journal)
        stack.callback(site.repair)
        stack.callback(runner.end_extra_processes)
        stack.callback(job.kill)
        stack.enter_context(_reader(spec, site, journal))
        stack.enter_context(closing(Sampler(journal, site, spec.journals)))
        begun_s = time.monotonic()
        code: int | None = None
        try:
            code = runner.run()
        except Exception as error:
            # Whatever the reason (the job, a fault that did not happen, the harness): the run proves nothing.
            journal.record("broken", why=f"{type(error).__name__}: {error}")
        _record_final(journal, spec, site)
        journal.record("end", exit_code=code, wall_s=time.monotonic() - begun_s)


@dataclass(slots=True)
class Patience:
    """Tells a job that hangs from one that is slow. ``end_s``: when it is to be over in any case."""

    end_s: float
    still_s: float
    """By when there is to be another step ..."""
    steps: int = 0
    """... than these."""

    def check(self, now_s: float, steps: int, version: int) -> None:
        """Raise OutOfTime if the job has completed no step for long, or takes too long altogether."""
        if steps > self.steps:
            self.steps, self.still_s = steps, now_s + _STILL_S
        if now_s > self.still_s:
            raise OutOfTime(f"the job completes no step any more; it is at version {version}")
        if now_s > self.end_s:
            raise OutOfTime(f"the job does not end; it is at version {version}")


class _Runner:
    def __init__(self, run: RunSpec, site: Site, job: Job, journal: Journal) -> None:
        self._run = run
        self._job = job
        self._journal = journal
        self._tail = Tail(run.job.journals)
        now_s = time.monotonic()
        self._patience = Patience(now_s + _GRACE_S + 2 * run.job.steps * max(run.job.pace_s, 0.02), now_s + _STILL_S)
        self._look_s = now_s
        self._context = Context(site, run.job, job, self._tail, self._wait, self._until, [])
        self._code: int | None = None
        self._quiet = False
        """Whether all faults are over."""
        self._faults = ExitStack()
        self._lasting: dict[int, tuple[float, ExitStack]] = {}
        """By number of a fault that is under way, until when, and what undoes it."""

    def run(self) -> int:
        with self._faults:  # what still lasts is undone, whatever ends the run
            return self._play()

    def _play(self) -> int:
        schedule = list(self._run.schedule)
        first = schedule.pop(0) if schedule and schedule[0].traits.at_start else None
        if first is not None:
            prepare(self._context, first)
            self._announce(first, "before the start")
        self._job.start()
        if first is not None:
            self._inject(first)
        self._until(self._first_step, _FIRST_STEP_S, "the job makes no first step")
        self._journal.record("started")
        started_s = time.monotonic()
        for fault in schedule:
            self._wait(started_s + fault.at_s - time.monotonic())
            if not self._run.scenario.at_once:
                self._await_end_of_faults()  # the one before may have begun late
            self._announce(fault, f"for {fault.for_s} s")
            self._inject(fault)
        self._await_end_of_faults()
        self._journal.record("quiet")
        self._quiet = True
        self._wait(REST_S)
        self._run.job.calm.touch()
        while self._code is None:
            self._turn()
        return self._code

    def _announce(self, fault: ScheduledFault, detail: str) -> None:
        self._journal.record("fault", id=fault.id, kind=fault.kind, target="", detail=detail, for_s=fault.for_s)

    def _inject(self, fault: ScheduledFault) -> None:
        """Let a fault begin; :meth:`_turn` undoes it when its time is over."""
        undo = self._faults.enter_context(ExitStack())
        evidence = undo.enter_context(inject(self._context, fault))
        self._journal.record("fired", id=fault.id, evidence=evidence)
        self._lasting[fault.id] = time.monotonic() + fault.for_s, undo

    def _await_end_of_faults(self) -> None:
        while self._lasting:
            self._turn()

    def _end_faults(self) -> None:
        """Undo those whose time is over."""
        for number, (until_s, undo) in list(self._lasting.items()):
            if time.monotonic() >= until_s and self._lasting.pop(number, None) is not None:
                undo.close()
                self._journal.record("healed", id=number)

    def end_extra_processes(self) -> None:
        """End the processes that faults have added to the job."""
        for process in self._context.extra_processes:
            process.kill()
            process.wait(_READER_END_S)

    def _first_step(self) -> bool | None:
        self._tail.look()
        return True if self._tail.steps else None

    def _wait(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        while time.monotonic() < until_s:
            self._turn()

    def _until(self, look: Callable[[], T | None], within_s: float, failing: str) -> T:
        until_s = time.monotonic() + within_s
        while (found := look()) is None:
            if time.monotonic() > until_s:
                raise NotFired(failing)
            self._turn()
        return found

    def _turn(self) -> None:
        """Let a little time pass, and restart what the harness must restart."""
        if self._code is None:
            self._code = self._job.poll()
            if self._code is not None and (self._code != 0 or not self._quiet):
                raise EndedEarly(f"the job ended with exit code {self._code}; see {self._run.job.log}")
        self._end_faults()
        now_s = time.monotonic()
        if now_s > self._look_s:
            self._look_s = now_s + _LOOK_S
            self._tail.look()
            self._patience.check(now_s, self._tail.steps, self._tail.version)
        time.sleep(_POLL_S)


@contextmanager
def _reader(spec: JobSpec, site: Site, journal: Journal) -> Iterator[None]:
    reader = site.spawner.spawn(
        "reader",
        "chaos.reader:main",
        [spec.name, site.redis.url, str(spec.journals)],
        {},
        None,
        spec.folder / "reader.log",
    )
    try:
        yield
    finally:
        reader.terminate()
        journal.record("reader", exit_code=reader.wait(_READER_END_S))


def _record_final(journal: Journal, spec: JobSpec, site: Site) -> None:
    try:
        digest = site.digest(spec.name, spec.last_version)
    except PsaError as error:
        journal.record("broken", why=f"the final state cannot be read: {error}")
    else:
        journal.record("final", version=spec.last_version, digest=digest)


def replay_command(scenario: str, seed: int, extra: Sequence[str] = ()) -> str:
    """Return the command that repeats a run."""
    return shlex.join(["psa", "chaos", "run", "--scenario", scenario, "--seed", str(seed), *extra])
