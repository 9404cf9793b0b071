"""What a worker has while its ``with`` statement lasts: opened in this order, closed in the reverse one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

from torch import nn

from psa_store import logs
from psa_store.checkpoint.change import Changed, change_job, newest_config
from psa_store.checkpoint.fitness import start_with
from psa_store.cluster import JobShape, ProcessRole
from psa_store.config import Settings, fill_addresses
from psa_store.coordination import Coordination
from psa_store.coordination.identity import new_member_id
from psa_store.errors import OutOfMemory, PsaError, UsageError
from psa_store.job.change import Numbers
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.job.wire_layout import WireLayout
from psa_store.observe import Monitor
from psa_store.observe.metrics import Metrics
from psa_store.storage import RedisStore
from psa_store.testing.journal import Journal
from psa_store.wire import Door, Mailbox, announce
from psa_store.worker.average import AverageInModel
from psa_store.worker.creation import Wanted, join_or_create
from psa_store.worker.data_position import DataPosition
from psa_store.worker.flat_model import FlatModel
from psa_store.worker.given_optimizer import GivenOptimizer
from psa_store.worker.health import Progress, WorkerHealth
from psa_store.worker.host_memory import must_suffice
from psa_store.worker.membership import Membership
from psa_store.worker.model_files import model_files
from psa_store.worker.server_connections import ServerConnections
from psa_store.worker.session import Tools
from psa_store.worker.staged_state import StagedScriptState
from psa_store.worker.stages import BuildStage, StagedModel
from psa_store.worker.state import ScriptState
from psa_store.worker.strategy import Strategy, strategy_of


@dataclass(frozen=True, slots=True)
class Given:
    """What the script gave to :class:`psa_store.Worker`."""

    wanted: Wanted
    model: nn.Module | None
    stages: Sequence[BuildStage]
    """Instead of a model, what builds its parts."""
    resident_stages: int | None
    layout: Layout
    optimizer: GivenOptimizer
    state: ScriptState | StagedScriptState | None
    steps: int | None
    push_early: bool | None
    tokenizer: Any


@dataclass(frozen=True, slots=True)
class Opened:
    """What is there from then on, until the stack that it was opened on is closed."""

    config: JobConfig
    model: FlatModel | StagedModel
    membership: Membership
    strategy: Strategy
    data_position: DataPosition
    average: AverageInModel
    change_job: Callable[[Numbers], Changed]


class Leaving:
    """SIGTERM says that this worker is to leave, whatever it waits for. Set ``session_leaves`` when there is one."""

    def __init__(self, mailbox: Mailbox[None]) -> None:
        self.told = False
        self.session_leaves: Callable[[], None] | None = None
        self._mailbox = mailbox

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.told = True
        if self.session_leaves is not None:
            self.session_leaves()
        self._mailbox.nudge()


def open_worker(stack: ExitStack, given: Given, settings: Settings, progress: Progress) -> Opened:
    """Join the job, or create it, and be a member of it."""
    settings = fill_addresses(settings)
    job, member = given.wanted.name, settings.member or new_member_id("worker")
    door = Door.from_settings(settings, job)
    logs.identify(job=job, member=member)
    journal = stack.enter_context(closing(Journal(settings.journal, "worker", member)))
    mailbox = stack.enter_context(closing(Mailbox[None]()))
    woken = threading.Event()
    store = stack.enter_context(closing(RedisStore.from_settings(settings)))
    coordination = stack.enter_context(closing(Coordination.from_settings(settings, job, wake=woken.set)))
    servers = stack.enter_context(closing(ServerConnections(given.layout, mailbox, door, progress.waits)))
    if given.state is not None:
        stack.callback(given.state.close)
    # Closed before the connections are: servers leave alone what a worker reads until it is gone.
    model = stack.enter_context(closing(_memory_of(given)))
    leaving = Leaving(mailbox)
    stack.enter_context(_sigterm_calls(leaving))
    stack.enter_context(given.optimizer.watched())
    start_with(settings, store, coordination)
    if settings.supervisor is not None:
        announce(settings.supervisor, {"event": "job", "job": job, "member": member})
    config = join_or_create(given.wanted, model, given.layout, settings, member, store, coordination, progress.waits)
    if given.state is not None and not config.keeps_script_state:
        raise UsageError(
            f"psa.Worker(state=) goes with mode sync, without backup and speculate, not with {config.mode}: there is "
            "no one version that it could belong to"
        )
    _keep_model_files(given, store)
    wire = WireLayout(given.layout, config.compression)
    model.receive_as(wire)
    documents = store.documents(job)

    def read_config() -> JobConfig:
        """Where no server lives that knows the layout, one that starts waits for it to be whole."""
        documents.keep_layout(given.layout)
        return newest_config(store, coordination, job)

    shape = JobShape(len(given.layout.shards), config.ranks, config.stages)
    membership = stack.enter_context(closing(Membership(member, shape, coordination, woken, mailbox, progress.waits)))
    strategy = strategy_of(
        Tools(
            config=config,
            layout=given.layout,
            wire=wire,
            steps=given.steps,
            model=model,
            servers=servers,
            membership=membership,
            journal=journal,
            read_config=read_config,
            progress=progress,
        ),
        model,
        may_share=settings.carrier == "auto",
    )
    given.optimizer.at = lambda step: strategy.session.history.at(step)
    metrics = Metrics(ProcessRole.WORKER, member)
    health = WorkerHealth(
        metrics,
        progress,
        membership,
        servers.traffic,
        given.optimizer.at,
        coordination.lease_left_s,
        lambda: coordination.set_aside + store.account.count,
    )
    if settings.monitor:
        stack.enter_context(closing(Monitor(job, metrics, health, settings)))
    leaving.session_leaves = partial(setattr, strategy.session, "leaving", True)
    if leaving.told:  # before there was a session to tell
        leaving.session_leaves()
    return Opened(
        config,
        model,
        membership,
        strategy,
        DataPosition(
            job,
            store,
            coordination,
            membership,
            settings.session_timeout_s,
            lambda: strategy.session.changes,
            door,
            progress.waits,
        ),
        AverageInModel(config, given.layout, model, membership, store, door),
        partial(change_job, store, coordination, job),
    )


def _memory_of(given: Given) -> FlatModel | StagedModel:
    if given.model is None:
        state = given.state if isinstance(given.state, StagedScriptState) else None
        return StagedModel(given.stages, given.layout, given.wanted.seed, state, given.resident_stages)
    with must_suffice("have the model in one piece", given.layout.arena_bytes):
        return FlatModel(given.model, given.layout, given.push_early)


def _keep_model_files(given: Given, store: RedisStore) -> None:
    """Have the job keep what this script says is to be in exports beside the tensors; what it says last counts."""
    files, stored = model_files(given.model, given.tokenizer), store.model_files(given.wanted.name)
    if files is not None and stored.digest() != files.digest:
        stored.write(files)


def announce_failure(settings: Settings, error: BaseException | None, where: str) -> None:
    """Tell the supervisor of an exception of the script, which ends this process.

    It may be a disk that did not answer once: tried again, unless it comes at the same place again.
    """
    supervisor, member = settings.supervisor, settings.member
    may_pass = not isinstance(error, PsaError) or isinstance(error, OutOfMemory)  # its stages may come to others
    if supervisor and member and isinstance(error, Exception) and may_pass:
        announce(supervisor, {"event": "failed", "member": member, "how": f"{type(error).__name__} at {where}"})


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
