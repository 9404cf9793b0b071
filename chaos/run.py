"""One run: a job is trained while a plan of faults is carried out, and everything is written down for the judge."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from chaos.injection import NotFired, Scene, injection, prepare
from chaos.job import RANKS, HostedJob, Job, Order, SupervisedJob
from chaos.sampler import Sampler
from chaos.scenarios import Scenario, Shape
from chaos.schedule import REST_S, ScheduledFault
from chaos.site import SESSION_TIMEOUT_S, Site
from chaos.tail import Tail
from psa_store.errors import PsaError
from psa_store.testing.journal import Journal

_POLL_S = 0.01
_GRACE_S = 120.0
"""How long a run may take beyond what its steps take when nothing happens."""
_FIRST_STEP_S = 60.0
_READER_END_S = 10.0
T = TypeVar("T")


class OutOfTime(Exception):
    """The job hangs, or makes no progress worth the name."""


class EndedEarly(Exception):
    """The job ended although faults were still to come, or it failed."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to do in one run."""

    scenario: Scenario
    seed: int
    plan: Sequence[ScheduledFault]
    order: Order
    replay: str


def carry_out(request: Request, site: Site) -> None:
    """Run a job under a plan of faults, leaving its journals in ``request.order.journals``. Raises nothing that the
    job did wrong: that is in the journals, for the judge."""
    order = request.order
    for folder in (order.folder, order.journals, order.failpoints):
        folder.mkdir(parents=True, exist_ok=True)
    site.make_whole()
    site.forget_jobs()
    job: Job = HostedJob(order, site) if site.shape is Shape.HOSTS else SupervisedJob(order, site)
    with ExitStack() as stack:
        journal = stack.enter_context(closing(Journal(order.journals, "harness", "0")))
        journal.record(
            "scenario",
            name=request.scenario.name,
            seed=request.seed,
            steps=order.steps,
            ranks=RANKS,
            commit_every=order.commit_every,
            supervised=site.shape is not Shape.HOSTS,
            session_timeout_s=SESSION_TIMEOUT_S,
            loses_redis=any(planned.fault.loses_data for planned in request.plan),
            replay=request.replay,
        )
        runner = _Runner(request, site, job, journal)
        stack.callback(site.make_whole)
        stack.callback(runner.end_guests)
        stack.callback(job.kill)
        stack.enter_context(_reader(order, site, journal))
        stack.enter_context(closing(Sampler(journal, site, order.journals)))
        begun_s = time.monotonic()
        code: int | None = None
        try:
            code = runner.run()
        except Exception as error:
            # Whatever it is (the job, a fault that did not happen, or the harness), the run proves nothing.
            journal.record("broken", why=f"{type(error).__name__}: {error}")
        _record_final(journal, order, site)
        journal.record("end", exit_code=code, wall_s=time.monotonic() - begun_s)


class _Runner:
    def __init__(self, request: Request, site: Site, job: Job, journal: Journal) -> None:
        self._request = request
        self._job = job
        self._journal = journal
        self._tail = Tail(request.order.journals)
        self._end_s = time.monotonic() + _GRACE_S + 2 * request.order.steps * max(request.order.pace_s, 0.02)
        self._scene = Scene(site, request.order, job, self._tail, self._wait, self._until, [])
        self._code: int | None = None
        self._quiet = False
        """All faults are over."""

    def run(self) -> int:
        plan = list(self._request.plan)
        if plan and plan[0].fault.at_start:
            prepare(self._scene, plan[0])
            self._journal.record("fault", id=0, kind=plan[0].kind, target="", detail="before the start")
        self._job.start()
        if plan and plan[0].fault.at_start:
            self._inject(plan.pop(0), announced=True)
        self._until(self._first_step, _FIRST_STEP_S, "the job makes no first step")
        self._journal.record("started")
        started_s = time.monotonic()
        for planned in plan:
            self._wait(started_s + planned.at_s - time.monotonic())
            self._inject(planned, announced=False)
        self._journal.record("quiet")
        self._quiet = True
        self._wait(REST_S)
        self._request.order.calm.touch()
        while self._code is None:
            self._turn()
        return self._code

    def _inject(self, planned: ScheduledFault, *, announced: bool) -> None:
        if not announced:
            self._journal.record("fault", id=planned.id, kind=planned.kind, target="", detail=f"for {planned.for_s} s")
        with injection(self._scene, planned) as evidence:
            self._journal.record("fired", id=planned.id, evidence=evidence)
            self._wait(planned.for_s)
        self._journal.record("healed", id=planned.id)

    def end_guests(self) -> None:
        """End what faults have started besides the job."""
        for guest in self._scene.guests:
            guest.kill()
            guest.wait(_READER_END_S)

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
        """Tend the job, and let a little time pass."""
        if self._code is None:
            self._code = self._job.tend()
            if self._code is not None and (self._code != 0 or not self._quiet):
                raise EndedEarly(f"the job ended with exit code {self._code}; see {self._request.order.log}")
        if time.monotonic() > self._end_s:
            self._tail.look()
            raise OutOfTime(f"the job does not end; it is at version {self._tail.version}")
        time.sleep(_POLL_S)


@contextmanager
def _reader(order: Order, site: Site, journal: Journal) -> Iterator[None]:
    reader = site.spawner.spawn(
        "reader",
        "chaos.reader:main",
        [order.name, site.redis.url, str(order.journals)],
        {},
        None,
        order.folder / "reader.log",
    )
    try:
        yield
    finally:
        reader.terminate()
        journal.record("reader", exit_code=reader.wait(_READER_END_S))


def _record_final(journal: Journal, order: Order, site: Site) -> None:
    try:
        digest = site.digest(order.name, order.steps)
    except PsaError as error:
        journal.record("broken", why=f"the final state cannot be read: {error}")
    else:
        journal.record("final", version=order.steps, digest=digest)


def replay_command(scenario: str, seed: int, extra: Sequence[str] = ()) -> str:
    """The command that plays a run again."""
    return shlex.join(["psa", "chaos", "run", "--scenario", scenario, "--seed", str(seed), *extra])
