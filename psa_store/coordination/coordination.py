"""What psa_store keeps in ZooKeeper for one job, and how a process takes part in it.

    /psa/<job>/config              what the job is                     written once
    /psa/<job>/term               the newest term                    grows by compare-and-set
    /psa/<job>/plan                who serves and computes what        replaced by compare-and-set
    /psa/<job>/servers/<id>        a server; workers/<id> a worker     ephemeral
    /psa/<job>/election/<s>-<n>    candidates for controller           ephemeral, sequential
    /psa/<job>/barriers/<n>        who must arrive, what came of it    replaced once
    /psa/<job>/checkpoints/<name>  somebody wants one                  goes when it is there, or cannot be
    /psa/<job>/<name>              a held name                         ephemeral

Every call is made of idempotent attempts and ends within ``connect_timeout_s``, or raises DependencyUnreachable; then
what it wanted to write may be written or not. Reads may be a little old: compare-and-set decides, not a read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from psa_store.cluster import ProcessRole
from psa_store.coordination import barrier, election, terms
from psa_store.coordination.barrier import Barrier
from psa_store.coordination.session import Session
from psa_store.coordination.znodes import Znodes
from psa_store.errors import Disconnected, UsageError

_ROOT = "psa"


@dataclass(frozen=True, slots=True)
class Versioned:
    """A znode's text and its ZooKeeper data version, for compare-and-set."""

    text: str
    version: int
    modified_s: float = field(default=0.0, compare=False)
    """When it was written, by ZooKeeper's clock, in seconds since 1970; 0 where it was not read."""


class Coordination:
    """One process's session with ZooKeeper for one job. Thread-safe; started and closed once.

    ``hosts``: "host:port,host:port/chroot"; the chroot is created when something is written below it. ``wake`` is
    called from a Kazoo thread, and must only set a flag: whenever something that was read with ``watch`` may have
    changed, when a predecessor or holder went, and on every change of the connection, since events may have been
    missed. Read again then.
    """

    def __init__(
        self,
        hosts: str,
        job: str,
        *,
        session_timeout_s: float,
        connect_timeout_s: float,
        wake: Callable[[], None],
    ) -> None:
        addresses, _, chroot = hosts.partition("/")
        self._hosts = hosts
        self._root = "/".join(["", *filter(None, chroot.split("/")), _ROOT])
        self._job = f"{self._root}/{job}"
        self._session = Session(
            addresses, session_timeout_s=session_timeout_s, connect_timeout_s=connect_timeout_s, wake=wake
        )
        self._joined: dict[ProcessRole, set[str]] = {role: set() for role in ProcessRole}
        """Ids under which we may be a member: all that we tried since the last success."""

    def start(self) -> None:
        """Connect. Raises DependencyUnreachable, naming the hosts, if no quorum answers in time."""
        self._session.start()

    def close(self) -> None:
        """End the session: our ephemerals vanish at once. Idempotent; calls that are under way raise Disconnected."""
        self._session.close()

    # --- the lease

    def lease_left_s(self) -> float:
        """How long this process may still believe that its ephemerals exist; at <= 0 it must stop serving.

        Counted by our own clock from the sending of the last heartbeat that was answered. After a session expired
        it stays <= 0 until :meth:`join` was called in the new one.
        """
        return self._session.lease_left_s()

    def session_generation(self) -> int:
        """Grows by one each time a session expired and a new one was made: join, campaign and hold again."""
        return self._session.generation

    # --- documents of the job

    def read_config(self) -> str | None:
        """What the job is; None if it was not created."""
        node = self._session.run(lambda znodes: znodes.get(f"{self._job}/config"))
        return node.text if node is not None else None

    def create_config(self, text: str) -> bool:
        """Store what the job is; False if that was done before."""
        return self._session.run(lambda znodes: _create_document(znodes, f"{self._job}/config", text))

    def next_term(self, at_least: int = 0) -> int:
        """Take a term that is greater than ``at_least`` and than all that were ever taken."""
        return self._session.run(lambda znodes: terms.take(znodes, self._term, at_least))

    def read_plan(self, *, watch: bool = False) -> Versioned | None:
        """The plan; None if there is none yet. ``watch``: wake when it is created or changes."""
        node = self._session.run(lambda znodes: znodes.get(f"{self._job}/plan", watch=watch))
        return Versioned(node.text, node.version, node.modified_s) if node is not None else None

    def write_plan(self, text: str, expected: int | None) -> Versioned | None:
        """Replace the plan of version ``expected``, or create it (None); None if someone else was faster."""
        return self._session.run(lambda znodes: _compare_and_set(znodes, f"{self._job}/plan", text, expected))

    # --- members

    def join(self, role: ProcessRole, member: str, text: str) -> None:
        """Be a member. A session has one member of each kind: joining under another id withdraws the earlier one.

        That holds also for a join that was cut off: else a member that nobody plays would stay until we end.
        """
        earlier = [self._member(role, other) for other in self._joined[role] - {member}]
        self._joined[role].add(member)
        owner = self._session.run(lambda znodes: _join(znodes, self._member(role, member), text, earlier))
        self._joined[role] = {member}
        self._session.settle(owner)

    def update(self, role: ProcessRole, member: str, text: str) -> None:
        """Replace a member's text. Raises Disconnected if it is no longer a member."""
        path = self._member(role, member)
        if self._session.run(lambda znodes: znodes.set(path, text)) is None:
            raise Disconnected(f"{path} is gone: the session expired or the member was reported dead; join again")

    def leave(self, role: ProcessRole, member: str) -> None:
        """Be a member no longer. Idempotent."""
        self._session.run(lambda znodes: znodes.delete(self._member(role, member)))

    def remove(self, role: ProcessRole, member: str) -> None:
        """Report that a member is dead: its znode and its candidacy go now, not when its session ends. Idempotent."""

        def attempt(znodes: Znodes) -> None:
            znodes.delete(self._member(role, member))
            if role is ProcessRole.SERVER:
                election.withdraw(znodes, self._election, member)

        self._session.run(attempt)

    def members(self, role: ProcessRole, *, watch: bool = False) -> dict[str, str]:
        """Text of each member by id. ``watch``: wake when one comes, goes or changes; for the controller only."""

        def attempt(znodes: Znodes) -> dict[str, str]:
            names = znodes.children(f"{self._job}/{role.value}s", watch=watch)
            nodes = znodes.get_all([self._member(role, name) for name in names], watch=watch)
            return {name: node.text for name, node in zip(names, nodes, strict=True) if node is not None}

        return self._session.run(attempt)

    # --- the election of the controller

    def campaign(self, member: str) -> None:
        """Be a candidate for controller. Idempotent within a session, which has one candidate."""
        self._session.run(lambda znodes: election.campaign(znodes, self._election, member))

    def is_elected(self, member: str) -> bool:
        """Whether ``member`` leads now; if not, wake when the candidate before it goes."""
        return self._session.run(lambda znodes: election.is_elected(znodes, self._election, member))

    def elected(self) -> str | None:
        """The member that leads now; None if there is no candidate."""
        return self._session.run(lambda znodes: election.elected(znodes, self._election))

    # --- checkpoint barriers

    def open_barrier(self, term: int, members: Iterable[str]) -> str:
        """Open a barrier for exactly these members; returns its id, which they must be told. Old ones are removed.

        Args:
            term: a newer one aborts it.
            members: ids of members of either kind; at least one.
        """
        wanted = sorted(set(members))
        if not wanted:
            raise UsageError("a barrier needs at least one member")
        return self._session.run(lambda znodes: barrier.open_barrier(znodes, self._barriers, term, wanted))

    def arrive(self, barrier_id: str, member: str, text: str) -> Barrier | None:
        """Say that ``member`` is there, with a small text that the others get to read; not before it is so.

        Returns the barrier as it is then, None if it is so old that it is gone. Idempotent; a member that is not
        expected changes nothing. Our arrival ends with our session.
        """
        path = f"{self._barriers}/{barrier_id}"
        return self._session.run(lambda znodes: barrier.arrive(znodes, path, self._term, member, text))

    def read_barrier(self, barrier_id: str, *, watch: bool = False) -> Barrier | None:
        """The barrier, None if it is gone. ``watch``: wake when it is decided."""
        path = f"{self._barriers}/{barrier_id}"
        return self._session.run(lambda znodes: barrier.read_barrier(znodes, path, watch=watch))

    def settle_barrier(self, barrier_id: str, *, expired: bool = False) -> Barrier | None:
        """Abort the barrier if it cannot succeed: a member has gone, a term has begun, or, with ``expired``, now.

        For the controller when members or term change, and for anybody who will not wait any longer. It may also
        turn out to be done: then everybody has arrived.
        """
        path = f"{self._barriers}/{barrier_id}"

        def attempt(znodes: Znodes) -> Barrier | None:
            living = [name for role in ProcessRole for name in znodes.children(f"{self._job}/{role.value}s")]
            return barrier.settle(znodes, path, self._term, living=living, expired=expired)

        return self._session.run(attempt)

    # --- wishes for checkpoints

    def request_checkpoint(self, name: str, text: str) -> bool:
        """Ask the controller for a checkpoint; False if somebody has asked for one of this name."""
        path = f"{self._checkpoints}/{name}"
        return self._session.run(lambda znodes: _create_document(znodes, path, text))

    def checkpoint_requests(self, *, watch: bool = False) -> list[str]:
        """Names of the checkpoints that are asked for. ``watch``: wake when one comes or goes."""
        return self._session.run(lambda znodes: znodes.children(self._checkpoints, watch=watch))

    def read_checkpoint_request(self, name: str, *, watch: bool = False) -> Versioned | None:
        """What was asked, or answered; None if it is gone. ``watch``: wake when that changes."""
        path = f"{self._checkpoints}/{name}"
        node = self._session.run(lambda znodes: znodes.get(path, watch=watch))
        return Versioned(node.text, node.version) if node is not None else None

    def answer_checkpoint_request(self, name: str, text: str) -> None:
        """Say what came of it, if it is still there."""
        self._session.run(lambda znodes: znodes.set(f"{self._checkpoints}/{name}", text))

    def withdraw_checkpoint_request(self, name: str) -> None:
        """Ask no longer. Idempotent."""
        self._session.run(lambda znodes: znodes.delete(f"{self._checkpoints}/{name}"))

    # --- a held name

    def hold(self, name: str, text: str) -> str | None:
        """Hold ``name`` until we release it or our session ends.

        Returns None if we hold it now, else the text of its present holder; then wake when that one goes.
        """
        return self._session.run(lambda znodes: _hold(znodes, f"{self._job}/{name}", text))

    def holder(self, name: str) -> str | None:
        """Text of the present holder of ``name``; None if nobody holds it."""
        node = self._session.run(lambda znodes: znodes.get(f"{self._job}/{name}"))
        return node.text if node is not None else None

    def release(self, name: str) -> None:
        """Hold ``name`` no longer. Idempotent; what another session holds stays."""
        self._session.run(lambda znodes: _release(znodes, f"{self._job}/{name}"))

    # --- the whole

    def delete_job(self) -> None:
        """Delete everything that ZooKeeper knows of the job. Idempotent."""
        self._session.run(lambda znodes: _delete_tree(znodes, self._job))

    def jobs(self) -> list[str]:
        """Names of the jobs that ZooKeeper knows."""
        return self._session.run(lambda znodes: znodes.children(self._root))

    def round_trip_s(self) -> float:
        """How long the way through our server to the leader and back takes now."""
        started_s = time.perf_counter()
        self._session.run(lambda znodes: znodes.sync())
        return time.perf_counter() - started_s

    @property
    def peer(self) -> str | None:
        """The ZooKeeper server that the session is connected to, ``host:port``."""
        return self._session.peer

    def describe(self) -> dict[str, object]:
        """Facts about the session, for people."""
        return {
            "hosts": self._hosts,
            "server": self._session.peer,
            "session_id": f"0x{self._session.id & 0xFFFF_FFFF_FFFF_FFFF:x}",
            "session_timeout_s": self._session.granted_s,
            "state": self._session.state.value,
            "generation": self._session.generation,
        }

    @property
    def _election(self) -> str:
        return f"{self._job}/election"

    @property
    def _barriers(self) -> str:
        return f"{self._job}/barriers"

    @property
    def _checkpoints(self) -> str:
        return f"{self._job}/checkpoints"

    @property
    def _term(self) -> str:
        return f"{self._job}/term"

    def _member(self, role: ProcessRole, member: str) -> str:
        if not member or "/" in member:
            raise UsageError(f"member id {member!r}: it must not be empty or contain '/'")
        return f"{self._job}/{role.value}s/{member}"


def _create_document(znodes: Znodes, path: str, text: str) -> bool:
    """After an attempt that was cut off, the same text counts as ours."""
    if znodes.create(path, text) is not None:
        return True
    node = znodes.get(path) if znodes.repeated else None
    return node is not None and node.text == text


def _compare_and_set(znodes: Znodes, path: str, text: str, expected: int | None) -> Versioned | None:
    """After an attempt that was cut off, our text at the version that we wanted to write is our own success."""
    if expected is None:
        node, wanted = znodes.create(path, text), 0
    else:
        node, wanted = znodes.set(path, text, expected), expected + 1
    if node is None and znodes.repeated:
        stored = znodes.get(path)
        if stored is not None and (stored.text, stored.version) == (text, wanted):
            node = stored
    return Versioned(node.text, node.version) if node is not None else None


def _join(znodes: Znodes, path: str, text: str, earlier: list[str]) -> int:
    """Returns the session that owns the node: ours. Ids are never reused, so any other owner is a former session."""
    znodes.delete(*earlier)
    while True:
        created = znodes.create(path, text, ephemeral=True)
        if created is not None:
            return created.owner
        node = znodes.get(path)
        if node is not None and node.owner == znodes.session_id and znodes.set(path, text) is not None:
            return node.owner
        znodes.delete(path)


def _hold(znodes: Znodes, path: str, text: str) -> str | None:
    """The owner of the node tells whether an attempt that was cut off succeeded."""
    while znodes.create(path, text, ephemeral=True) is None:
        node = znodes.get(path, watch=True)
        if node is not None:
            return None if node.owner == znodes.session_id else node.text
    return None


def _release(znodes: Znodes, path: str) -> None:
    node = znodes.get(path)
    if node is not None and node.owner == znodes.session_id:
        znodes.delete(path)


def _delete_tree(znodes: Znodes, path: str) -> None:
    """Repeats while members that do not know of it yet put something back."""
    while names := znodes.children(path):
        children = [f"{path}/{name}" for name in names]
        znodes.delete(*children)
        for child in children:
            if znodes.get(child) is not None:
                _delete_tree(znodes, child)
    znodes.delete(path)
