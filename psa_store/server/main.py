"""A server process from start to end: what `psa server` and `psa run` start."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, suppress

import torch

from psa_store import logs
from psa_store.checkpoint.catalog import CheckpointPolicy
from psa_store.checkpoint.change import newest_config
from psa_store.checkpoint.fitness import start_with
from psa_store.checkpoint.take import take_at_end
from psa_store.cluster import JobShape, Member, ProcessRole
from psa_store.config import Settings, check_bind, fill_addresses
from psa_store.coordination import Coordination
from psa_store.coordination.identity import new_member_id
from psa_store.errors import DataIntegrity, DependencyUnreachable
from psa_store.job.config import JobConfig, check_job_name
from psa_store.job.document import judged
from psa_store.job.layout import Layout, layout_from_json
from psa_store.job.wire_layout import WireLayout
from psa_store.logs import Waits
from psa_store.observe import Events, Monitor, Page
from psa_store.observe.metrics import Metrics
from psa_store.server.aggregator import rules_of
from psa_store.server.checkpoints import Checkpoints
from psa_store.server.committer import Committer
from psa_store.server.controller import Controller
from psa_store.server.entrance import Limits
from psa_store.server.event_loop import EventLoop
from psa_store.server.health import ServerHealth
from psa_store.server.listening import advertised, listen
from psa_store.server.plan_follower import PlanFollower
from psa_store.server.shard_loading import ShardLoader
from psa_store.storage import RedisStore, keys
from psa_store.testing.journal import Journal
from psa_store.wire import Door, host_identity, listen_local

_POLL_S = 0.05
_SIGNAL_CHECK_S = 0.5
_HEAL_S = 20.0
"""How long a damaged layout may take to be written again: workers that have lost their server look anew."""
_DESCRIPTORS_MAX = 1 << 20


def raise_descriptor_limit() -> int:
    """Let this process have as many descriptors as it may have at all; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # more than the kernel gives, or than this user may ask for
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard if hard != resource.RLIM_INFINITY else _DESCRIPTORS_MAX
    return soft


class _Leave:
    """Signal handler: remembers that this process was asked to leave, and wakes the plan follower."""

    def __init__(self, woken: threading.Event) -> None:
        self.asked = False
        self._woken = woken

    def __call__(self, _number: int, _frame: object) -> None:
        self.asked = True
        self._woken.set()


def serve(job: str, settings: Settings) -> None:
    """Serve shards of ``job`` until SIGTERM or SIGINT; then hand over and return.

    Call it in the main thread of a process that does nothing else: it pins torch to one thread per operation.

    Raises:
        DependencyUnreachable: Redis or ZooKeeper does not answer at the start. Later outages are waited for.
        DataIntegrity: the stored state of the job cannot be served.
    """
    check_job_name(job)
    settings = fill_addresses(settings)
    check_bind(settings)
    told = advertised(settings)
    door, limits = Door.from_settings(settings, job), Limits.of(raise_descriptor_limit())
    torch.set_num_threads(1)
    member_id = settings.member or new_member_id("server")
    logs.identify(job=job, member=member_id)
    woken, waits = threading.Event(), Waits()
    leave = _Leave(woken)
    with ExitStack() as stack:
        store = stack.enter_context(closing(RedisStore.from_settings(settings)))
        coordination = stack.enter_context(closing(Coordination.from_settings(settings, job, wake=woken.set)))
        start_with(settings, store, coordination)
        for number in (signal.SIGTERM, signal.SIGINT):
            # The parent may have decided that Ctrl-C does not concern this process: `psa run`, nohup, a shell's `&`.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, leave)
        found = _wait_for_job(job, store, coordination, leave, waits)
        if found is None:
            return
        config, layout = found
        journal = stack.enter_context(closing(Journal(settings.journal, "server", member_id)))
        tcp, address = listen(settings, told)
        local_name = f"psa-{member_id}"
        local = listen_local(local_name)
        member = Member(
            member_id,
            host_identity(),
            os.getpid(),
            address=address,
            local=local_name if local is not None else "",
        )
        policy = CheckpointPolicy.from_settings(settings)
        wire = WireLayout(layout, config.compression)
        rests = not rules_of(config).on_arrival  # there ranks keep what is not durable, and wait for it
        metrics, events = Metrics(ProcessRole.SERVER, member_id), Events()
        controller = Controller(
            config=config,
            layout=layout,
            store=store,
            coordination=coordination,
            checkpoints=Checkpoints(config, layout, store, coordination, policy, metrics, events, door),
            journal=journal,
            metrics=metrics,
            events=events,
            wake=woken.set,
        )
        loader = ShardLoader(config, layout, wire, store, coordination, journal)
        plan_follower = PlanFollower(
            member=member,
            shape=JobShape(len(layout.shards), config.ranks, config.stages),
            coordination=coordination,
            loader=loader,
            controller=controller,
            memory_bytes=layout.arena_bytes,
            woken=woken,
            leaving=lambda: leave.asked,
            door=door,
            leave_timeout_s=settings.leave_timeout_s,
            waits=waits,
        )
        event_loop = EventLoop(
            member=member_id,
            config=config,
            layout=layout,
            wire=wire,
            threads=settings.server_threads,
            listeners=[tcp] if local is None else [tcp, local],
            lease=coordination.lease,
            door=door,
            limits=limits,
            make_committer=lambda post: Committer(store, config, layout, post, metrics, waits, rests=rests),
            report=plan_follower.report,
            journal=journal,
            metrics=metrics,
            waits=waits,
        )
        health = ServerHealth(
            event_loop, metrics, events, lambda: plan_follower.member, coordination.lease_left_s, waits
        )
        event_loop.start()
        try:
            with ExitStack() as watched:
                if settings.monitor:
                    page = watched.enter_context(closing(Page(job, settings, lambda: events.members is not None)))
                    # Closed before the event loop is: what it tells last is how the job ended.
                    monitor = Monitor(job, metrics, health, settings, events=events, pages=page.routes())
                    watched.enter_context(closing(monitor))
                # Not in this thread: a signal handler here must never meet the lock of an event that it sets.
                runner = watched.enter_context(ThreadPoolExecutor(1, thread_name_prefix="psa-plan"))
                governing = runner.submit(plan_follower.run, event_loop)
                while not governing.done():
                    wait([governing], timeout=_SIGNAL_CHECK_S)
                governing.result()
        finally:
            event_loop.close()
            # Before files are finished: the next controller has work to do.
            with suppress(DependencyUnreachable):
                coordination.remove(ProcessRole.SERVER, plan_follower.member)
            plan_follower.close()
        if policy.automatic:
            take_at_end(config, layout, store, coordination, policy)


def _wait_for_job(
    job: str, store: RedisStore, coordination: Coordination, leave: _Leave, waits: Waits
) -> tuple[JobConfig, Layout] | None:
    """Wait until a worker has created the job; None if this process is told to stop before.

    Raises:
        DataIntegrity: its layout is damaged, and no server or worker has written it again.
    """
    damaged_since_s: float | None = None
    while not leave.asked:
        found = store.read_job(job)
        if found is not None:
            layout = judged(layout_from_json, found[1], keys.layout(job))
            if isinstance(layout, Layout):
                waits.over("job")
                return newest_config(store, coordination, job), layout
            damaged_since_s = damaged_since_s or time.monotonic()
            if time.monotonic() > damaged_since_s + _HEAL_S:
                raise DataIntegrity(
                    f"{layout.where} in Redis is damaged, and no server or worker that lives knows better: "
                    f"{layout.why}. Start a worker of the job: its model has the layout"
                )
        if found is None:
            waits.on("job", f"a worker to create job {job!r}")
        else:
            waits.on("job", f"the layout of job {job!r} to be written again", "it is damaged")
        time.sleep(_POLL_S)
    return None
