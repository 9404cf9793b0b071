"""What psa_store keeps in ZooKeeper for one job, and how a process takes part in it.

    /psa/<job>/config              what the job is                     written once
    /psa/<job>/term                the newest term                    grows by compare-and-set
    /psa/<job>/plan                owners of shards, holders of ranks  replaced by compare-and-set
    /psa/<job>/servers/<id>        a server; workers/<id> a worker     ephemeral
    /psa/<job>/election/<s>-<n>    candidates for controller           ephemeral, sequential
    /psa/<job>/barriers/<n>        its members, what came of it        replaced once
    /psa/<job>/checkpoints/<name>  a request for a checkpoint          goes when that is there, or cannot be
    /psa/<job>/<name>              a held name                         ephemeral

Documents go in and out as types; each has one reader and one writer, which are called here alone. What can not be read
comes out as Damaged, and never as an error: a neighbour may have written it. Every call is made of idempotent attempts
and ends within ``connect_timeout_s``, or raises DependencyUnreachable; then what it wanted to write may be written or
not. Reads may be a little old: compare-and-set decides, not a read.
"""
# The class is longer than ours may be: it is one door to one tree, and what lies behind it are modules of their own.

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from psa_store.cluster import JobShape, Member, Plan, ProcessRole, member_from_json, plan_from_json
from psa_store.config import Settings
from psa_store.coordination import attempts, barrier, election, terms
from psa_store.coordination.access import Access, access_of, as_access
from psa_store.coordination.barrier import Barrier
from psa_store.coordination.documents import Reader
from psa_store.coordination.request import CheckpointRequest, request_from_json
from psa_store.coordination.session import Lease, Session, SessionState, now_s
from psa_store.coordination.znodes import Znode, Znodes
from psa_store.errors import DataIntegrity, Disconnected, UsageError
from psa_store.job.config import JobConfig, job_config_from_json
from psa_store.job.document import Damaged


@dataclass(frozen=True, slots=True)
class StoredPlan:
    """The plan as ZooKeeper has it. To write one, show which was read: compare-and-set."""

    plan: Plan
    version: int
    """ZooKeeper's number of this text."""
    modified_s: float = field(default=0.0, compare=False)
    """When it was written, by ZooKeeper's clock, in seconds since 1970; 0 where it was not read."""


class Coordination:
    """One process's session with ZooKeeper for one job. Thread-safe; started and closed once, as ``with`` does.

    ``where``: as PSA_ZOOKEEPER has it; its chroot is created when something is written below it. ``wake`` is called
    from a Kazoo thread, and must only set a flag: whenever something that was read with ``watch`` may have changed,
    when a predecessor or holder went, and on every change of the connection, since events may have been
    missed. Read again then.
    """

    def __init__(
        self,
        where: Access | str,
        job: str,
        *,
        session_timeout_s: float,
        connect_timeout_s: float,
        wake: Callable[[], None],
    ) -> None:
        access = as_access(where)
        self._root = access.root
        self._job = f"{self._root}/{job}"
        self._term = f"{self._job}/term"
        self._election = f"{self._job}/election"
        self._barriers = f"{self._job}/barriers"
        self._checkpoints = f"{self._job}/checkpoints"
        self._session = Session(
            access, session_timeout_s=session_timeout_s, connect_timeout_s=connect_timeout_s, wake=wake
        )
        self._reader = Reader()
        self._joined: dict[ProcessRole, set[str]] = {role: set() for role in ProcessRole}
        """Ids under which we may be a member: all that we tried since the last success."""

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        job: str,
        *,
        wake: Callable[[], None] = lambda: None,
        connect_timeout_s: float | None = None,
    ) -> Coordination:
        """For the ZooKeeper of the settings, else the private one that runs; ``connect_timeout_s``: if theirs is not
        meant.

        Raises:
            UsageError: neither is known.
        """
        return cls(
            access_of(settings),
            job,
            session_timeout_s=settings.session_timeout_s,
            connect_timeout_s=connect_timeout_s or settings.connect_timeout_s,
            wake=wake,
        )

    def start(self) -> None:
        """Connect, and see that we may read what is there.

        Raises:
            DependencyUnreachable: no quorum answers in time, or it does not let us in; the message names the hosts.
        """
        self._session.start()
        try:
            self.jobs()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the session: our ephemerals vanish at once. Idempotent; calls that are under way raise Disconnected."""
        self._session.close()

    def __enter__(self) -> Coordination:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- the lease

    def lease_left_s(self) -> float:
        """How long this process may still believe that its ephemerals exist; at <= 0 it must stop serving.

        Counted by our own clock from the sending of the last heartbeat that was answered. After a session expired
        it stays <= 0 until :meth:`join` was called in the new one.
        """
        return self._session.lease.until_s - now_s()

    @property
    def lease(self) -> Lease:
        """The same, to be read where a call is too much."""
        return self._session.lease

    def session_generation(self) -> int:
        """Grows by one each time a session expired and a new one was made: join, campaign and hold again."""
        return self._session.generation

    # --- documents of the job

    def read_config(self, *, watch: bool = False) -> JobConfig | Damaged | None:
        """What the job is; None if it was not created. ``watch``: wake when it is created or changes."""
        node = self._session.run(lambda znodes: znodes.get(f"{self._job}/config", watch=watch))
        return self._reader.read(node, job_config_from_json) if node is not None else None

    def create_config(self, config: JobConfig) -> bool:
        """Store what the job is; False if that was done before."""
        return self._session.run(
            lambda znodes: attempts.create_document(znodes, f"{self._job}/config", config.to_json())
        )

    def replace_config(self, config: JobConfig) -> None:
        """Store what the job is, in place of what is there."""
        self._session.run(lambda znodes: attempts.put_document(znodes, f"{self._job}/config", config.to_json()))

    def next_term(self, at_least: int = 0) -> int:
        """Take a term that is greater than ``at_least`` and than all that were ever taken."""
        return self._session.run(lambda znodes: terms.take(znodes, self._term, at_least, self._reader))

    def read_term(self, known: int) -> int | Damaged:
        """The newest term; 0 if there was none. ``known``: one that was published, to judge by."""
        return terms.newest(self._session.run(lambda znodes: znodes.get(self._term)), known, self._reader)

    def mend_term(self, at_least: int) -> None:
        """Write the term again if its znode is damaged, gone, or below one that was published; wake when it changes."""
        self._session.run(lambda znodes: terms.mend(znodes, self._term, at_least, self._reader))

    def read_plan(self, shape: JobShape | None = None, *, watch: bool = False) -> StoredPlan | Damaged | None:
        """The plan; None if there is none yet.

        Args:
            shape: the plan of a job of another shape is none; None believes any.
            watch: wake when it is created or changes.
        """
        node = self._session.run(lambda znodes: znodes.get(f"{self._job}/plan", watch=watch))
        if node is None:
            return None

        def parse(text: str) -> Plan:
            plan = plan_from_json(text)
            if shape is not None:
                plan.check(shape)
            return plan

        found = self._reader.read(node, parse)
        return found if isinstance(found, Damaged) else StoredPlan(found, node.version, node.modified_s)

    def write_plan(self, plan: Plan, seen: StoredPlan | Damaged | None) -> StoredPlan | None:
        """Replace the plan that was read, or create the first (None); None if another process was faster."""
        path, text, expected = f"{self._job}/plan", plan.to_json(), seen.version if seen is not None else None
        node = self._session.run(lambda znodes: attempts.compare_and_set(znodes, path, text, expected))
        return StoredPlan(plan, node.version) if node is not None else None

    # --- members

    def join(self, role: ProcessRole, member: Member) -> None:
        """Be a member. A session has one member of each role: joining under another id withdraws the earlier one.

        That holds also for a join that was cut off: else a member that no process is would stay until we end.
        """
        path, text = self._member(role, member.id), member.to_json()
        earlier = [self._member(role, other) for other in self._joined[role] - {member.id}]
        self._joined[role].add(member.id)
        owner = self._session.run(lambda znodes: attempts.join(znodes, path, text, earlier))
        self._joined[role] = {member.id}
        self._session.settle(owner)

    def update(self, role: ProcessRole, member: Member) -> None:
        """See to it that our znode says this of us, and wake when another process changes or deletes it.

        Raises Disconnected if we are no longer a member.
        """
        path, text = self._member(role, member.id), member.to_json()
        found = self._session.run(lambda znodes: attempts.keep(znodes, path, text))
        if found is None:
            raise Disconnected(f"{path} is gone: the session expired or the member was reported dead; join again")
        self._reader.read(found, partial(_member_of, member.id))

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

    def members(self, role: ProcessRole, *, watch: bool = False) -> dict[str, Member | Damaged]:
        """What stands where members are, by id; see :func:`psa_store.cluster.believed`.

        ``watch``: wake when one comes, goes or changes; for the controller only.
        """

        def attempt(znodes: Znodes) -> dict[str, Znode]:
            names = znodes.children(f"{self._job}/{role.value}s", watch=watch)
            nodes = znodes.get_all([self._member(role, name) for name in names], watch=watch)
            return {name: node for name, node in zip(names, nodes, strict=True) if node is not None}

        found = self._session.run(attempt)
        return {
            name: self._reader.read(node, partial(_member_of, name), ephemeral=True) for name, node in found.items()
        }

    def living(self, role: ProcessRole) -> list[str]:
        """Ids of the members that a session keeps, whatever their znodes say."""
        return [name for name, each in self.members(role).items() if isinstance(each, Member) or each.kept]

    # --- the election of the controller

    def campaign(self, member: str) -> None:
        """Be a candidate for controller. Idempotent within a session, which has one candidate."""
        self._session.run(lambda znodes: election.campaign(znodes, self._election, member))

    def is_elected(self, member: str) -> bool:
        """Whether ``member`` is the controller now; if not, wake when the candidate before it goes."""
        return self._session.run(lambda znodes: election.is_elected(znodes, self._election, member))

    def elected(self) -> str | None:
        """The member that is the controller now; None if there is no candidate."""
        return self._session.run(lambda znodes: election.elected(znodes, self._election))

    # --- checkpoint barriers

    def open_barrier(self, term: int, members: Iterable[str]) -> str:
        """Open a barrier for exactly these members; returns its id, which they must be told. Old ones are removed.

        Args:
            term: a newer one aborts it.
            members: ids of members of either role; at least one.
        """
        wanted = sorted(set(members))
        if not wanted:
            raise UsageError("a barrier needs at least one member")
        return self._session.run(lambda znodes: barrier.open_barrier(znodes, self._barriers, term, wanted))

    def arrive(self, barrier_id: str, member: str, version: int) -> Barrier | None:
        """Say that ``member`` has arrived, with the version that it has pinned; not before it is so.

        Returns the barrier as it is then, None if it is so old that it is gone. Idempotent; a member that is not
        expected changes nothing. Our arrival ends with our session.
        """
        path = f"{self._barriers}/{barrier_id}"
        return self._session.run(lambda znodes: barrier.arrive(znodes, path, self._term, self._reader, member, version))

    def read_barrier(self, barrier_id: str, *, watch: bool = False) -> Barrier | None:
        """The barrier, None if it is gone. ``watch``: wake when it is decided."""
        path = f"{self._barriers}/{barrier_id}"
        return self._session.run(lambda znodes: barrier.read_barrier(znodes, path, self._reader, watch=watch))

    def settle_barrier(self, barrier_id: str, *, expired: bool = False) -> Barrier | None:
        """Abort the barrier if it cannot succeed: a member has gone, a term has begun, or, with ``expired``, now.

        For the controller when members or term change, and for any process that will not wait any longer. It may
        also turn out to be done: then all have arrived.
        """
        path = f"{self._barriers}/{barrier_id}"

        def attempt(znodes: Znodes) -> Barrier | None:
            living = [name for role in ProcessRole for name in znodes.children(f"{self._job}/{role.value}s")]
            return barrier.settle(znodes, path, self._term, self._reader, living=living, expired=expired)

        return self._session.run(attempt)

    # --- requests for checkpoints

    def request_checkpoint(self, name: str, request: CheckpointRequest) -> bool:
        """Ask the controller for a checkpoint; False if one of this name is asked for already."""
        path = f"{self._checkpoints}/{name}"
        return self._session.run(lambda znodes: attempts.create_document(znodes, path, request.to_json()))

    def checkpoint_requests(self, *, watch: bool = False) -> list[str]:
        """Names of the checkpoints that are asked for. ``watch``: wake when one comes or goes."""
        return self._session.run(lambda znodes: znodes.children(self._checkpoints, watch=watch))

    def read_checkpoint_request(self, name: str, *, watch: bool = False) -> CheckpointRequest | Damaged | None:
        """What was asked, or answered; None if it is gone. ``watch``: wake when that changes."""
        node = self._session.run(lambda znodes: znodes.get(f"{self._checkpoints}/{name}", watch=watch))
        return self._reader.read(node, request_from_json) if node is not None else None

    def answer_checkpoint_request(self, name: str, answer: CheckpointRequest) -> None:
        """Say what came of it, if it is still there."""
        self._session.run(lambda znodes: znodes.set(f"{self._checkpoints}/{name}", answer.to_json()))

    def withdraw_checkpoint_request(self, name: str) -> None:
        """Ask no longer. Idempotent."""
        self._session.run(lambda znodes: znodes.delete(f"{self._checkpoints}/{name}"))

    # --- a held name

    def hold(self, name: str, text: str) -> str | None:
        """Hold ``name`` until we release it or our session ends.

        Returns None if we hold it now, else the text of its present holder; then wake when that one goes.
        """
        return self._session.run(lambda znodes: attempts.hold(znodes, f"{self._job}/{name}", text))

    def holder(self, name: str) -> str | None:
        """Text of the present holder of ``name``; None if it is not held."""
        node = self._session.run(lambda znodes: znodes.get(f"{self._job}/{name}"))
        return node.text if node is not None else None

    def release(self, name: str) -> None:
        """Hold ``name`` no longer. Idempotent; what another session holds stays."""
        self._session.run(lambda znodes: attempts.release(znodes, f"{self._job}/{name}"))

    # --- what was set aside

    @property
    def set_aside(self) -> int:
        """How many znodes were set aside by this process, because they could not be read."""
        return self._reader.account.count

    def damage(self) -> list[Damaged]:
        """Those since the last call."""
        return self._reader.account.news()

    # --- the whole

    def delete_job(self) -> int:
        """Delete everything that ZooKeeper knows of the job; returns how many znodes. Idempotent."""
        return self._session.run(lambda znodes: attempts.delete_tree(znodes, self._job))

    def jobs(self) -> list[str]:
        """Names of the jobs that ZooKeeper knows."""
        names = self._session.run(lambda znodes: znodes.children(self._root))
        return [name for name in names if not name.startswith(attempts.PROBE)]

    def rehearse(self) -> None:
        """Make sure that we may create, change and delete below the root, by doing it once.

        Raises:
            DependencyUnfit: the ACL of what is there does not let us.
        """
        path = f"{self._root}/{attempts.PROBE}{secrets.token_hex(8)}"
        self._session.run(lambda znodes: attempts.rehearse(znodes, path))

    def round_trip_s(self) -> float:
        """How long the way through our server to the leader and back takes now."""
        started_s = time.perf_counter()
        self._session.run(lambda znodes: znodes.sync())
        return time.perf_counter() - started_s

    # --- the session, for people

    @property
    def peer(self) -> str | None:
        """Address of the ZooKeeper server that we last connected to."""
        return self._session.peer

    @property
    def session_timeout_s(self) -> float:
        """The timeout that it granted."""
        return self._session.granted_s

    @property
    def session_state(self) -> SessionState:
        return self._session.state

    def _member(self, role: ProcessRole, member: str) -> str:
        if not member or "/" in member:
            raise UsageError(f"member id {member!r}: it must not be empty or contain '/'")
        return f"{self._job}/{role.value}s/{member}"


def _member_of(name: str, text: str) -> Member:
    """The member of a znode of this name."""
    member = member_from_json(text)
    if member.id != name:
        raise DataIntegrity(f"it says that it is {member.id[:80]!r}")
    return member


def known_plan(seen: StoredPlan | Damaged | None) -> Plan | None:
    """The plan, if there is one that can be read."""
    return seen.plan if isinstance(seen, StoredPlan) else None
