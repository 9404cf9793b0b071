"""The worker's side of training, as user code sees it: a context manager, an iterator of batches, and ``step()``.

Everything here runs in the thread of the user's script; there is no background thread but Kazoo's. The servers are
listened to only inside :meth:`Worker.step` and between batches, so the model cannot change under a running forward
or backward pass.

The loop that matters is :meth:`Worker._next_draw`: look at the plan, have the parameters of its epoch, and find a
rank of ours that has not pushed its gradient for the present version. Every disturbance (a new epoch, a lost
connection, a rank more or less) only changes what that loop finds the next time.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from types import FrameType, TracebackType
from typing import Any

from torch import nn

from psa_store import telemetry
from psa_store.config import load_settings
from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.coordination import Coordination
from psa_store.errors import Disconnected, NonFiniteGradient, Refused, UsageError
from psa_store.failpoints import failpoint
from psa_store.identity import new_member_id
from psa_store.job import check_job_name
from psa_store.journal import Journal, fingerprint_text
from psa_store.layout import Role, plan_layout
from psa_store.mode import parse_mode
from psa_store.optim import Optimizer
from psa_store.plan import NOBODY, Plan
from psa_store.storage import RedisStore
from psa_store.transport import WireLayout
from psa_store.wire import Header, Kind, Mailbox, announce
from psa_store.worker.arena import ModelArena, describe_model
from psa_store.worker.creation import Wanted, join_or_create
from psa_store.worker.feed import Draw, Feed, seed_everything
from psa_store.worker.fleet import Answer, Fleet, Greeting, is_about_plan
from psa_store.worker.gradients import GradientPool
from psa_store.worker.membership import Membership

_WAIT_S = 0.5
"""How long one wait lasts at most before everything is looked at again; nothing depends on it but signals."""
_PUSH_SHARDS = 16
"""Shards that are checked and then pushed together, where many are ready at once: the first travel meanwhile."""
_NONE = -1
_NEVER = 1 << 62
"""A version that no job reaches: waiting for it is waiting for something else."""


class Worker:
    """Compute gradients for some ranks of a job; the servers do the rest.

    Args:
        job: name of the training run; None takes ``PSA_JOB``. Running the same job again resumes it.
        model: any module. Its parameters and buffers become views of one flat memory while the worker lives.
        optimizer: from ``psa.optim``; its update is applied by the servers.
        ranks: world size, fixed when the job is created. None: the stored one, or ``PSA_RANKS``, or 1.
        steps: where the job ends; None: never.
        seed: root of all randomness: order of samples, and torch's, numpy's and Python's generators per (step, rank).
        mode: who waits for whom: "sync", "async" or "ssp:staleness=2" (see ``psa_store.mode``), fixed when the job is
            created. None: the stored one, or ``PSA_MODE``, or "sync".
        shard_bytes: size of a shard, a multiple of 4096. None: chosen by the size of the model.

    Raises:
        UsageError: the model, the optimizer or the surroundings cannot be used; JobMismatch if the job exists
            with others.
        DependencyUnreachable: Redis or ZooKeeper does not answer.

    Not thread-safe. Example::

        with psa.Worker("demo", model, optimizer=psa.optim.SGD(lr=0.1), steps=100) as worker:
            for x, y in worker.batches(dataset, batch_size=32):
                loss(model(x), y).backward()
                worker.step()
    """

    def __init__(
        self,
        job: str | None,
        model: nn.Module,
        *,
        optimizer: Optimizer,
        ranks: int | None = None,
        steps: int | None = None,
        seed: int = 0,
        mode: str | None = None,
        shard_bytes: int | None = None,
    ) -> None:
        if steps is not None and steps < 0:
            raise UsageError(f"steps={steps}: must not be negative")
        self._settings = load_settings()
        name = job or self._settings.job
        if not name:
            raise UsageError("the job has no name: give psa.Worker a name or set PSA_JOB")
        check_job_name(name)
        self._steps = steps
        self._log = telemetry.get_logger()
        self._model = model
        self._layout = plan_layout(describe_model(model, optimizer.group_of), shard_bytes)
        self._wanted = Wanted(
            name=name,
            ranks=ranks,
            seed=seed,
            optimizer=optimizer.to_dict(),
            layout=self._layout.fingerprint,
            mode=None if mode is None else parse_mode(mode),
        )

        self._version = 0
        self._synced_epoch = _NONE
        """Epoch whose parameters the model has; _NONE: what we have and what the servers have must be compared."""
        self._plan_needed = _NONE
        self._pushed: set[int] = set()
        self._flaw = ""
        """A parameter whose gradient is not finite, in a job that does not skip such steps."""
        self._awaited = _NONE
        self._brought: dict[str, int] = {}
        """The version that each server has brought since we wait for one."""
        self._arrived: dict[int, int] = {}
        """The version in which each shard has arrived since we began to load."""
        self._frozen_loaded = False
        self._fingerprint = 0
        """Of the gradient that is being computed, for the journal."""
        self._durable_answers = 0
        self._current: Draw | None = None
        self._finished = False
        self._leaving = False
        self._opened = False

    # --- what user code may ask

    @property
    def version(self) -> int:
        """Steps that the parameters in the model have behind them."""
        return self._version

    @property
    def rank(self) -> int:
        """The rank for which the present batch is."""
        if self._current is None:
            raise UsageError("worker.rank exists between a batch and its worker.step()")
        return self._current.rank

    @property
    def ranks(self) -> int:
        """World size."""
        return self._config.ranks

    @property
    def epoch(self) -> int:
        """Epoch of the plan that this worker follows."""
        plan = self._membership.standing.plan
        return plan.epoch if plan else 0

    @property
    def members(self) -> int:
        """Workers that hold a rank."""
        plan = self._membership.standing.plan
        return len(set(plan.ranks) - {NOBODY}) if plan else 0

    @property
    def leads_output(self) -> bool:
        """True in one process at a time, the one that holds rank 0: print and evaluate there."""
        standing = self._membership.standing
        return standing.plan is not None and standing.plan.ranks[0] == standing.member

    @property
    def finished(self) -> bool:
        """True once all steps are done and durable; False in a worker that leaves before."""
        return self._finished

    # --- life

    def __enter__(self) -> Worker:
        settings = self._settings
        if settings.redis is None or settings.zookeeper is None:
            raise UsageError("PSA_REDIS and PSA_ZOOKEEPER are not set: run the script with `psa run`, or set both")
        name, member = self._wanted.name, settings.member or new_member_id("worker")
        with ExitStack() as stack:
            self._journal = stack.enter_context(closing(Journal(settings.journal, "worker", member)))
            self._mailbox = stack.enter_context(closing(Mailbox[None]()))
            woken = threading.Event()
            store = stack.enter_context(closing(RedisStore(settings.redis, timeout_s=settings.connect_timeout_s)))
            coordination = stack.enter_context(
                closing(
                    Coordination(
                        settings.zookeeper,
                        name,
                        session_timeout_s=settings.session_timeout_s,
                        connect_timeout_s=settings.connect_timeout_s,
                        wake=woken.set,
                    )
                )
            )
            self._fleet = stack.enter_context(
                closing(Fleet(self._layout, self._place, self._mailbox, settings.carrier))
            )
            # Closed before the connections are: servers leave alone what we read until we are gone.
            self._arena = stack.enter_context(closing(ModelArena(self._model, self._layout, self._on_shards_ready)))
            stack.enter_context(_sigterm_calls(self._on_sigterm))
            store.check()
            coordination.start()
            if settings.supervisor is not None:
                announce(settings.supervisor, {"event": "job", "job": name, "member": member})
            self._config = join_or_create(
                self._wanted, self._arena, self._layout, settings, member, store, coordination
            )
            wire = WireLayout(self._layout, self._config.transport)
            self._arena.carry(wire)
            self._gradient_pool = GradientPool(self._layout, wire)
            self._gradients = self._gradient_pool.take()
            self._membership = stack.enter_context(closing(Membership(member, coordination, woken, self._mailbox)))
            self._resources = stack.pop_all()
        self._opened = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave the job: other workers get our ranks. The model keeps its parameters. Idempotent."""
        if self._opened:
            self._opened = False
            self._resources.close()

    # --- training

    def batches(self, data: Any, batch_size: int | None = None) -> Iterator[Any]:
        """Yield this worker's batches until the job ends, or until this worker is told to leave.

        Args:
            data: a map-style dataset, or a DataLoader whose dataset, collate function and processes are used.
            batch_size: samples per step over all ranks; each rank gets an equal share.

        After a crash anywhere the sequence may go back to an earlier step; the model goes back with it.
        """
        if not self._opened:
            raise UsageError("use the worker in a `with` statement")
        feed = Feed(data, batch_size, seed=self._config.seed, ranks=self._config.ranks)
        with closing(feed):
            while True:
                draw = self._next_draw()
                if draw is None:
                    return
                batch = feed.get(draw, self._holding())
                self._flaw = ""
                self._fingerprint = 0
                self._journal.record("computing", epoch=self._synced_epoch, step=draw.step, rank=draw.rank)
                self._arena.begin(self._gradients)
                seed_everything(self._config.seed, draw, "compute")
                self._current = draw
                yield batch
                if self._current is not None:
                    raise UsageError("the batch was not followed by worker.step()")

    def step(self) -> None:
        """Push the gradient of the present batch; with it the step's last, wait for the next version and load it.

        Raises:
            NonFiniteGradient: the gradient holds NaN or Inf and the job refuses such.
        """
        if self._current is None:
            raise UsageError("worker.step() without a batch from worker.batches()")
        draw = self._current
        self._arena.end()
        if self._flaw:
            raise NonFiniteGradient(
                f"rank {draw.rank} computed NaN or Inf at step {draw.step} in the gradient of {self._flaw}. "
                "Lower the learning rate, clip, or skip such steps (--skip-nonfinite on a new job)."
            )
        if draw.rank == RANK_OF_BUFFERS:
            self._arena.collect_buffers()
            for shard in self._layout.shards_of(Role.BUFFER):
                self._fleet.push_value(self._plan, draw.step, draw.rank, shard.index, self._arena.parameters(shard))
        self._current = None
        self._journal.record(
            "pushed",
            epoch=self._synced_epoch,
            step=draw.step,
            rank=draw.rank,
            sum=fingerprint_text(self._fingerprint),
        )
        failpoint("push.done")
        self._pushed.add(draw.rank)
        if self._pushed.issuperset(self._holding()):
            self._await(self._version + 1)
        # An epoch may have ended in the middle of the new version: user code must not see a mixture.
        while self._synced_epoch == _NONE and not self._leaving:
            if self._settle() is None:
                self._wait()

    def accumulate(self) -> AbstractContextManager[None]:
        """Inside, ``backward()`` only adds up gradients; call it for all but the last part of a batch."""
        return self._arena.accumulate()

    # --- what comes next

    def _next_draw(self) -> Draw | None:
        """The next (step, rank) to compute; None when the job is finished or we leave."""
        while not self._leaving:
            plan = self._settle()
            if plan is None:
                self._wait()
            elif self._steps is not None and self._version >= self._steps:
                if self._make_durable(plan):
                    self._finished = True
                    self._journal.record("finished", version=self._version)
                    return None
            elif plan.revision < self._plan_needed:
                self._membership.refresh()  # a ZooKeeper server that is behind gave us an old plan
                self._wait()
            elif todo := [rank for rank in self._holding() if rank not in self._pushed]:
                if self._awaited != _NONE:
                    # We told the servers that we have done with this version, so it may change where the model has it.
                    self._out_of_sync("more ranks came in the middle of a step")
                elif self._take_gradient_memory():
                    return Draw(self._version, todo[0])
            elif self._holding():
                self._await(self._version + 1)
            else:
                self._await(self._steps if self._steps is not None else _NEVER)
        return None

    def _holding(self) -> tuple[int, ...]:
        """The ranks that the plan gives us."""
        standing = self._membership.standing
        return standing.plan.ranks_of(standing.member) if standing.plan else ()

    def _settle(self) -> Plan | None:
        """Follow the present plan and have the parameters of its epoch; None if that is not possible yet."""
        plan = self._membership.standing.plan
        if plan is None or not plan.owners:
            return None
        if self._synced_epoch == plan.epoch:
            self._plan = plan
            return plan
        return plan if self._load(plan) else None

    def _disturbed(self) -> bool:
        """Whether there is something else to do than to wait for the present step."""
        standing = self._membership.standing
        if standing.plan is None or standing.plan.epoch != self._synced_epoch:
            self._synced_epoch = _NONE
            return True
        self._plan = standing.plan
        return self._leaving or not self._pushed.issuperset(self._holding())

    def _await(self, version: int) -> None:
        """Wait until the model has ``version``; come back early when there is something else to do."""
        idle = not self._holding()
        try:
            owners = {self._plan.owner_of(shard.index).id for shard in self._layout.versioned}
            if self._awaited != version:
                self._awaited = version
                self._brought = {}
                self._fleet.wait_for(self._plan, owners, version)
            while not self._disturbed():
                if len(self._brought) == len(owners):
                    if set(self._brought.values()) == {version}:
                        self._journal.record("acked", epoch=self._synced_epoch, version=version)
                        self._version_arrived(version)
                    else:  # the job went on without us while our ranks were with others
                        self._synced_epoch = _NONE
                    return
                self._take(self._fleet.pump(_WAIT_S))
        except Disconnected as error:
            self._out_of_sync(str(error))
        if idle:
            self._synced_epoch = _NONE  # we watched from the side: the model is not at the present version

    def _version_arrived(self, version: int) -> None:
        self._version = version
        self._pushed.clear()
        self._awaited = _NONE
        self._gradient_pool.release()
        self._arena.version_arrived()

    def _take_gradient_memory(self) -> bool:
        """Have memory that nobody reads for the next gradient; False if something came in between.

        Where servers read gradients in place, each rank of a step needs its own. Where they are sent, one is enough,
        once it has left.
        """
        try:
            while not self._fleet.shares and self._fleet.sending:
                self._take(self._fleet.pump(_WAIT_S))
                if self._membership.standing.plan is not self._plan or self._leaving:
                    return False
        except Disconnected as error:
            self._out_of_sync(str(error))
        if self._synced_epoch == _NONE:
            return False
        if not self._fleet.shares:
            self._gradient_pool.release()
        self._gradients = self._gradient_pool.take()
        return True

    # --- loading

    def _load(self, plan: Plan) -> bool:
        """Get all shards at one version of this epoch; False if the plan or a connection changed meanwhile."""
        self._out_of_sync(f"epoch {plan.epoch}")
        if not self._fleet.connect(plan, self._greeting()):
            return False
        self._plan = plan
        versioned = [shard.index for shard in self._layout.versioned]
        wanted = dict.fromkeys(versioned, plan.resume)
        if not self._frozen_loaded:
            wanted |= {shard.index: 0 for shard in self._layout.shards_of(Role.FROZEN)}
        newest = plan.resume
        try:
            while wanted:
                for shard, at_least in wanted.items():
                    self._arrived.pop(shard, None)
                    self._fleet.pull(plan, shard, at_least)
                while any(shard not in self._arrived for shard in wanted):
                    now = self._membership.standing.plan
                    if now is None or now.epoch != plan.epoch or self._leaving:
                        return False
                    self._take(self._fleet.pump(_WAIT_S))
                # A step may complete while we read: then some shards are a version ahead of others.
                newest = max((self._arrived[shard] for shard in versioned), default=newest)
                wanted = {shard: newest for shard in versioned if self._arrived[shard] < newest}
        except Disconnected as error:
            self._out_of_sync(str(error))
            return False
        self._frozen_loaded = True
        self._synced_epoch = plan.epoch
        self._journal.record("loaded", epoch=plan.epoch, version=newest)
        failpoint("worker.loaded")
        self._version_arrived(newest)
        return True

    def _out_of_sync(self, why: str) -> None:
        """What was in flight is unknown: load again, compute again. Servers recognise what they already have."""
        self._log.debug("connecting anew", why=why)
        self._gradient_pool.give_up()
        self._fleet.disconnect()
        self._arena.hide()
        self._synced_epoch = _NONE
        self._awaited = _NONE
        self._arrived = {}
        self._pushed.clear()

    def _greeting(self) -> Greeting:
        return Greeting(self._config.name, self._layout.fingerprint, self._membership.standing.member)

    def _place(self, header: Header) -> memoryview:
        """Where PARAMS go: straight into the model."""
        if header.shard >= len(self._layout.shards):
            raise Refused(f"PARAMS of shard {header.shard}, which does not exist")
        return self._arena.place(self._layout.shards[header.shard])

    def _take(self, answers: list[Answer]) -> None:
        for answer in answers:
            header = answer.header
            match header.kind:
                case Kind.PARAMS:
                    self._arrived[header.shard] = header.step
                case Kind.VERSION:
                    self._brought[answer.server] = header.step
                    if answer.descriptor is not None:
                        self._arena.show(answer.server, answer.descriptor, self._trained_shards_of(answer.server))
                case Kind.DURABLE:
                    self._durable_answers += 1
                case Kind.REFUSED:
                    self._on_refusal(header, answer.text)
                case _:
                    pass

    def _trained_shards_of(self, server: str) -> list[int]:
        return [i for i in self._plan.shards_of(server) if self._layout.shards[i].role is Role.TRAINED]

    def _on_refusal(self, header: Header, text: str) -> None:
        if is_about_plan(header.reason):
            if header.step == self._version:
                self._pushed.discard(header.rank)
            self._plan_needed = max(self._plan_needed, header.revision)
            self._membership.refresh()
            return
        raise Refused(f"a server refused this worker: {text}")

    def _wait(self) -> None:
        """Wait for news."""
        try:
            self._take(self._fleet.pump(_WAIT_S))
        except Disconnected as error:
            self._out_of_sync(str(error))

    # --- the end

    def _make_durable(self, plan: Plan) -> bool:
        """Wait until all servers have committed the last step; False if an epoch came in between."""
        self._durable_answers = 0
        try:
            self._fleet.finish(plan, self._version)
            while self._durable_answers < len(plan.servers):
                now = self._membership.standing.plan
                if self._leaving or now is None or now.epoch != plan.epoch:
                    return False
                self._take(self._fleet.pump(_WAIT_S))
        except Disconnected as error:
            self._out_of_sync(str(error))
            return False
        return True

    # --- from other threads and signals

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        self._leaving = True
        self._mailbox.nudge()

    def _on_shards_ready(self, shards: list[int]) -> None:
        """The gradients of some shards are whole, in the middle of backward: start pushing them."""
        assert self._current is not None
        for start in range(0, len(shards), _PUSH_SHARDS):
            some = shards[start : start + _PUSH_SHARDS]
            flaws = [self._gradients.flaw(self._layout.shards[shard]) for shard in some]
            flaw = next((each for each in flaws if each), "")
            if flaw and not self._config.skip_nonfinite:
                self._flaw = self._flaw or flaw
                return
            if self._journal.enabled:
                shares = (self._gradients.fingerprint(self._layout.shards[shard]) for shard in some)
                self._fingerprint += sum(shares)
            self._fleet.push(self._plan, self._current.step, self._current.rank, some, self._gradients, not flaw)
            failpoint("push.middle", some[-1])


@contextmanager
def _sigterm_calls(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Route SIGTERM to ``handler``, if this is the main thread, where alone that is possible."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)
