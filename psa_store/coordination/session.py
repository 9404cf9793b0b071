"""A session with ZooKeeper: its state, its generation, its lease, and calls that end in time.

Calls: :meth:`Session.run` repeats an attempt that was cut off, until a deadline. An attempt must therefore be
idempotent; how each one is, stands beside it, in ``attempts.py``, ``barrier.py`` and ``election.py``.

Lease: Kazoo reports the loss of a session only once it is connected again, so we count for ourselves. ZooKeeper keeps
a session for the granted timeout after our last message came; what it has answered has come no earlier than we sent
it. A third of the timeout is kept back, because a follower tells the leader of its clients' signs of life only
every half tick. For the same reason a heartbeat is a sync, which only the leader answers: a follower that is cut off
from the others goes on answering reads for some ticks, while the leader already lets our session expire.

Kazoo drops watches with the connection and calls them then. Every change of state calls ``wake`` as well, so callers
read (and watch) again after reconnecting.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

from kazoo.exceptions import (
    AuthFailedError,
    ConnectionLoss,
    KazooException,
    NoAuthError,
    OperationTimeoutError,
    SessionExpiredError,
)
from kazoo.handlers.threading import KazooTimeoutError
from kazoo.protocol.states import KazooState, KeeperState

from psa_store.coordination.access import Access
from psa_store.coordination.client import Client
from psa_store.coordination.znodes import Znodes
from psa_store.errors import DependencyUnfit, DependencyUnreachable, Disconnected

T = TypeVar("T")

_BEATS_PER_TIMEOUT = 6
_LEASE_SHARE = 2 / 3
_ATTEMPT_SHARE = 1 / 5
"""Part of the connect timeout that one attempt to connect may take; what remains is the patience of ``start``."""
_ATTEMPT_S_MAX = 2.0
_GOODBYE_S_MAX = 2.0

_OUTCOME_UNKNOWN = (ConnectionLoss, OperationTimeoutError, SessionExpiredError)


class SessionState(StrEnum):
    """What we know of the session."""

    CONNECTED = "connected"
    SUSPENDED = "suspended"  # not connected: the session may live or not
    LOST = "lost"  # expired, or not yet there
    CLOSED = "closed"  # by us


_STATES = {
    KazooState.CONNECTED: SessionState.CONNECTED,
    KazooState.SUSPENDED: SessionState.SUSPENDED,
    KazooState.LOST: SessionState.LOST,
}


@dataclass(slots=True)
class Lease:
    """Until when our ephemerals exist for certain, by CLOCK_BOOTTIME. Any thread may read it."""

    until_s: float = -math.inf


class Session:
    """Thread-safe; started and closed once.

    Owns the thread ``psa-zookeeper-heartbeat`` and, through Kazoo, three named ``psa-zookeeper-<n>``.
    """

    def __init__(
        self, access: Access, *, session_timeout_s: float, connect_timeout_s: float, wake: Callable[[], None]
    ) -> None:
        self._access = access
        self._connect_timeout_s = connect_timeout_s
        self._wake = wake
        self._attempt_s = min(connect_timeout_s * _ATTEMPT_SHARE, _ATTEMPT_S_MAX)
        self._client = Client(access, session_timeout_s, self._attempt_s)
        self._client.add_listener(self._on_state)
        self._changed = threading.Condition()
        self._state = SessionState.LOST
        self._id = 0
        self._generation = 0
        self._home = 0
        """The session that our ephemerals are in; after an expiry a former one, until the caller joins again."""
        self.lease = Lease()
        self._beaten_until_s = -math.inf
        """Until when the last answered heartbeat keeps the present session alive."""
        self._closing = threading.Event()
        self._life = threading.Lock()
        self._heartbeat = threading.Thread(target=self._keep_beating, name="psa-zookeeper-heartbeat")

    # --- life

    def start(self) -> None:
        """Connect. Raises DependencyUnreachable if that is not possible in time; the session is closed then."""
        until_s = now_s() + self._connect_timeout_s
        try:
            connected = self._client.start_async()
            if not connected.wait(self._connect_timeout_s - self._attempt_s):
                raise self._unreachable()
            self.run(self._beat, until_s=until_s)
        except BaseException:
            self.close()
            raise
        self._heartbeat.start()

    def close(self) -> None:
        """End the session; its ephemerals vanish at once, or with its timeout if ZooKeeper is away. Idempotent."""
        with self._life:
            if self._closing.is_set():
                return
            self._closing.set()
            with self._changed:
                hopeless = self._state is not SessionState.CONNECTED
                self._state = SessionState.CLOSED
                self._changed.notify_all()
            self._client.finish(0.0 if hopeless else min(self._connect_timeout_s, _GOODBYE_S_MAX))
        if self._heartbeat.ident is not None:
            self._heartbeat.join()

    # --- what we know

    @property
    def id(self) -> int:
        return self._id

    @property
    def state(self) -> SessionState:
        return self._state

    @property
    def granted_s(self) -> float:
        """Session timeout that the server granted."""
        return self._client.granted_s

    @property
    def peer(self) -> str | None:
        """Address of the server that we last connected to."""
        return self._client.peer

    @property
    def generation(self) -> int:
        """How many sessions before this one have expired."""
        return self._generation

    def settle(self, owner: int) -> None:
        """The caller's ephemerals are in the session ``owner``: the lease counts if that is the present one."""
        with self._changed:
            self._home = owner
            self._renew()

    # --- calls

    def run(self, attempt: Callable[[Znodes], T], *, until_s: float | None = None) -> T:
        """Make attempts until one is not cut off, for as long as ``connect_timeout_s``.

        Raises:
            DependencyUnreachable: time is up. What the call wanted to write may be written or not.
            Disconnected: this session was closed.
        """
        deadline_s = now_s() + self._connect_timeout_s if until_s is None else until_s
        repeated = False
        while True:
            self._await_connection(deadline_s)
            znodes = Znodes(
                self._client,
                session_id=lambda: self._id,
                left_s=lambda: deadline_s - now_s(),
                on_watch=self._on_watch,
                repeated=repeated,
            )
            try:
                return attempt(znodes)
            except _OUTCOME_UNKNOWN:
                repeated = True
            except KazooTimeoutError as error:
                raise self._unreachable() from error
            except (NoAuthError, AuthFailedError) as error:
                raise self._refused() from error
            except KazooException as error:
                raise DependencyUnfit(f"ZooKeeper at {self._access} refused a request: {error!r}.") from error

    def _await_connection(self, deadline_s: float) -> None:
        """Znodes are made only while connected: Kazoo would keep them, and send them after we have given up."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._client.connected or self._client.refused or self._closing.is_set(),
                max(0.0, deadline_s - now_s()),
            )
        if self._closing.is_set():
            raise Disconnected(f"this process has closed its session with ZooKeeper at {self._access}")
        if self._client.refused:
            raise self._refused()
        if not self._client.connected or now_s() >= deadline_s:
            raise self._unreachable()

    def _refused(self) -> DependencyUnfit:
        user = self._access.user
        if not user:
            return DependencyUnfit(
                f"ZooKeeper at {self._access} lets only its owner in: put user and password into the address, "
                "PSA_ZOOKEEPER=user:password@host:port/chroot, or into a file, PSA_ZOOKEEPER_CREDENTIALS"
            )
        return DependencyUnfit(
            f"ZooKeeper at {self._access} does not let user {user!r} in with this password: what is there belongs to "
            "another user, or was made with another password. Correct PSA_ZOOKEEPER (or PSA_ZOOKEEPER_CREDENTIALS)"
        )

    def _unreachable(self) -> DependencyUnreachable:
        problem = self._client.problem or f"session {self._state.value}"
        return DependencyUnreachable(
            f"ZooKeeper at {self._access} did not answer within {self._connect_timeout_s:g} s "
            f"({problem}). Check that it runs, has a quorum, and that PSA_ZOOKEEPER names it."
        )

    # --- heartbeats, in their own thread

    def _keep_beating(self) -> None:
        while not self._closing.wait(self.granted_s / _BEATS_PER_TIMEOUT):
            self._revive()
            try:
                self.run(self._beat)
            except (DependencyUnreachable, Disconnected):
                continue  # the lease runs out by itself

    def _beat(self, znodes: Znodes) -> None:
        session, sent_s = self._id, now_s()
        znodes.sync()
        with self._changed:
            if session == self._id:
                self._beaten_until_s = sent_s + self.granted_s * _LEASE_SHARE
                self._renew()

    def _renew(self) -> None:
        self.lease.until_s = self._beaten_until_s if self._home == self._id else -math.inf

    def _revive(self) -> None:
        """Kazoo's thread ends on an answer that it cannot read; nothing else would start it again."""
        with self._life:
            if not self._closing.is_set() and self._client.client_state == KeeperState.CLOSED:
                self._client.start_async()

    # --- called by Kazoo's threads: note it, tell, return

    def _on_state(self, state: str) -> None:
        with self._changed:
            if not self._closing.is_set():
                self._state = _STATES[state]
            if state == KazooState.LOST:
                self._beaten_until_s = -math.inf
            elif state == KazooState.CONNECTED:
                self._enter(self._client.client_id[0])
            self._renew()
            self._changed.notify_all()
        self._wake()

    def _enter(self, session: int) -> None:
        if self._id == 0:
            self._home = session
        elif self._id != session:
            self._generation += 1
        self._id = session

    def _on_watch(self, _event: object) -> None:
        self._wake()


def now_s() -> float:
    """Monotonic, and it goes on while the machine is suspended: so does ZooKeeper's clock elsewhere."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
