"""The event loop of a server: takes gradients in, hands new versions out.

One thread owns everything that serves: the connections, the frames' handlers, and the aggregator of the present term.
The threads of arithmetic reduce and update, the committer writes to Redis, and the plan follower tells which shards to
own. They talk through mailboxes only, so nothing in here needs a lock.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Sequence

import torch

from psa_store import logs
from psa_store.coordination import Lease
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout
from psa_store.job.wire_layout import WireLayout
from psa_store.logs import Waits
from psa_store.observe.metrics import Metrics
from psa_store.server.arithmetic import Arithmetic
from psa_store.server.committer import Committer
from psa_store.server.entrance import Limits
from psa_store.server.frame_handler import FrameHandler
from psa_store.server.messages import (
    Committed,
    Done,
    Join,
    Lost,
    Quit,
    Release,
    Revise,
    Serve,
    ToEventLoop,
    ToPlanFollower,
    Updated,
)
from psa_store.server.serving import Serving
from psa_store.server.stalls import LOOK_EVERY_S, Stalls
from psa_store.testing.journal import Journal
from psa_store.wire import Door, Mailbox, Traffic

_TICK_S = 0.2
_LAPSED_PAUSE_S = 0.02


class EventLoop:
    """Owns the thread ``psa-event-loop``. Other threads talk to it through :meth:`post`."""

    IDLE = "idle"

    def __init__(
        self,
        *,
        member: str,
        config: JobConfig,
        layout: Layout,
        wire: WireLayout,
        threads: int,
        listeners: Sequence[socket.socket],
        lease: Lease,
        make_committer: Callable[[Callable[[Committed | Lost], None]], Committer],
        report: Callable[[ToPlanFollower], None],
        journal: Journal,
        metrics: Metrics,
        door: Door,
        limits: Limits,
        waits: Waits,
    ) -> None:
        self.turned_s = time.monotonic()
        """When the loop turned last."""
        self.failure: BaseException | None = None
        self._log = logs.get_logger()
        self._lease = lease
        self._lapsed = False
        self._stalls = Stalls(waits)
        self._look_at_s = self.turned_s + LOOK_EVERY_S
        self._busy = False
        self._mailbox: Mailbox[ToEventLoop] = Mailbox()
        self._committer = make_committer(self._mailbox.post)
        self._arithmetic = Arithmetic(threads, self._mailbox.post)
        self._frames = FrameHandler(
            member=member,
            config=config,
            layout=layout,
            wire=wire,
            listeners=listeners,
            wake=self._mailbox,
            journal=journal,
            peer_gone=report,
            door=door,
            limits=limits,
            refused=lambda: metrics.add("refused_connections"),
        )
        self._connections = self._frames.connections
        self._serving = Serving(
            config=config,
            layout=layout,
            arithmetic=self._arithmetic,
            committer=self._committer,
            frames=self._frames,
            journal=journal,
            metrics=metrics,
            report=report,
            post=self._mailbox.post,
        )
        self._thread = threading.Thread(target=self._run, name="psa-event-loop")

    # --- the loop

    def _run(self) -> None:
        torch.set_num_threads(1)  # counts for the calling thread; small jobs are updated in this one
        try:
            while self._turn():
                pass
        except BaseException as error:
            self.failure = error  # a bug: the plan follower raises it, so that the process ends and is seen to fail
        finally:
            self._serving.end()
            self._connections.close_all()

    def _turn(self) -> bool:
        """Wait for events, serve frames, handle messages, let the aggregator advance; False at the end."""
        self.turned_s = time.monotonic()
        events = self._connections.wait(0.0 if self._busy else _TICK_S)
        if self._has_lapsed():
            time.sleep(_LAPSED_PAUSE_S)  # neither read nor answer
        else:
            self._connections.serve(events)
        if any(key.data is None for key, _ in events):
            for message in self._mailbox.drain():
                if isinstance(message, Quit):
                    return False
                self._handle(message)
        aggregator = self._frames.aggregator
        if self.turned_s >= self._look_at_s:
            self._look_at_s = self.turned_s + LOOK_EVERY_S
            self._stalls.look(self.turned_s, aggregator, self._frames.waiters, lapsed=self._lapsed)
        self._busy = not self._lapsed and aggregator is not None and aggregator.advance()
        return True

    def _has_lapsed(self) -> bool:
        """Whether ZooKeeper may have declared this server dead, since it is silent."""
        # After the wait, in which the process may have been paused for long. The clock is that of the lease.
        lapsed = time.clock_gettime(time.CLOCK_BOOTTIME) >= self._lease.until_s
        if lapsed is not self._lapsed:
            self._lapsed = lapsed
            self._log.warning("ZooKeeper is silent: not serving" if lapsed else "ZooKeeper answers: serving")
        return lapsed

    def _handle(self, message: ToEventLoop) -> None:
        match message:
            case Release():
                self._serving.release(message.term)
            case Serve():
                self._serving.begin(message)
            case Revise():
                self._serving.revise(message.plan)
            case Join():
                self._serving.join(message)
            case Lost() | Done() | Updated() | Committed():
                aggregator = self._frames.aggregator
                if aggregator is None or aggregator.plan.term != message.term:
                    pass  # from another thread, about a term that is over
                elif isinstance(message, Lost):
                    self._serving.lose(message)
                else:
                    aggregator.on_message(message)

    # --- for the other threads

    def start(self) -> None:
        self._thread.start()

    def post(self, message: ToEventLoop) -> None:
        self._mailbox.post(message)

    def close(self) -> None:
        """Stop serving and release every thread and descriptor."""
        self.post(Quit())
        self._thread.join()
        self._committer.close()
        self._arithmetic.close()
        self._mailbox.close()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def stage(self) -> str:
        """What is going on; IDLE: there is no term to serve."""
        aggregator = self._frames.aggregator
        return aggregator.stage if aggregator is not None else self.IDLE

    @property
    def finished(self) -> int | None:
        """The version with which the job ended, in the server that the plan names first; None elsewhere and before."""
        return self._serving.finished

    @property
    def traffic(self) -> Traffic:
        return self._connections.traffic
