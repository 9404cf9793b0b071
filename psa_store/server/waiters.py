"""What workers wait for: shards by value, the next version, durability. Used by the event loop's thread only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from psa_store.cluster import Plan
from psa_store.errors import Refused
from psa_store.job.layout import TensorRole
from psa_store.optim.slots import AVERAGE
from psa_store.optim.tensors import as_bytes
from psa_store.server.clients import Client, SharedParameters
from psa_store.server.connections import Connections
from psa_store.server.shard import OwnedShard
from psa_store.testing.journal import Journal
from psa_store.wire import Connection, Flag, Header, Kind

_BUFFERS = frozenset({TensorRole.BUFFER})
_CHANGING = frozenset({TensorRole.TRAINED, TensorRole.BUFFER})


@dataclass(frozen=True, slots=True)
class Now:
    """What there is to answer with."""

    plan: Plan
    version: int
    committed: int
    owned_shards: Mapping[int, OwnedShard]
    changed: Sequence[OwnedShard]
    """What the newest version changed: all that a worker needs that has the one before."""
    answer_to: Callable[[Header], int | None]
    """The version with which an AWAIT can be answered; None: not yet."""


class Waiters:
    """Requests that are answered as soon as they can be.

    Args:
        shows_parameters: whether workers of this host read parameters in the memory of this server.
        waiting_max: requests of one kind that may wait for one peer: more than one that is right ever has.
    """

    def __init__(
        self,
        connections: Connections,
        parameters: SharedParameters,
        journal: Journal,
        *,
        shows_parameters: bool,
        waiting_max: int,
    ) -> None:
        self._connections = connections
        self._parameters = parameters
        self._journal = journal
        self._shows_parameters = shows_parameters
        self._waiting_max = waiting_max
        self._pulls: dict[Connection, list[Header]] = {}
        self._awaits: dict[Client, Header] = {}
        self._finishes: list[tuple[Connection, Header]] = []
        self._streaming: set[Client] = set()
        """Workers that get the shards of the next version by value, one by one, while it is being made."""
        self.stale = False
        """Whether an answer may be possible that was not before: something was asked, or has changed."""
        self.awaited: frozenset[int] = frozenset()
        """The versions that workers wait for to become durable."""
        self.finished: int | None = None
        """The newest version that a worker was told to be durable, as workers ask at the end of a job."""

    def pull(self, connection: Connection, header: Header) -> None:
        """PULL: one shard by value, at ``header.step`` or later. Raises Refused: too many wait already."""
        waiting = self._pulls.setdefault(connection, [])
        self._check_few(len(waiting), header)
        waiting.append(header)
        self.stale = True

    def wait(self, client: Client, header: Header, *, at_once: bool) -> None:
        """AWAIT: everything, at ``header.step`` or later. The worker reads no version before that any more.

        ``at_once``: whether it may be answered now. A step has one of each worker, and all wait for its end.
        """
        if client.reading is not None and client.reading < header.step:
            client.reading = None
        self._awaits[client] = header
        self.stale = self.stale or at_once

    def finish(self, connection: Connection, header: Header) -> None:
        """FINISH: tell when ``header.step`` is durable. Raises Refused: too many wait already."""
        self._check_few(sum(each is connection for each, _ in self._finishes), header)
        self._set_finishes([*self._finishes, (connection, header)])
        self.stale = True

    def _check_few(self, waiting: int, header: Header) -> None:
        if waiting >= self._waiting_max:
            raise Refused(f"{header.kind.name}, and {waiting} of them wait already")

    def clear(self) -> None:
        self._pulls.clear()
        self._awaits.clear()
        self._set_finishes([])
        self._streaming.clear()

    def forget(self, connection: Connection) -> None:
        """Nothing waits at this connection any more."""
        self._pulls.pop(connection, None)
        self._set_finishes([each for each in self._finishes if each[0] is not connection])
        for client in [each for each in self._awaits if each.connection is connection]:
            del self._awaits[client]
            self._streaming.discard(client)

    def await_next(self, version: int) -> bool:
        """Whether a worker waits for what comes after this version. One without ranks waits for the last one."""
        return any(header.step <= version + 1 for header in self._awaits.values())

    def _set_finishes(self, finishes: list[tuple[Connection, Header]]) -> None:
        self._finishes = finishes
        self.awaited = frozenset(header.step for _, header in finishes)

    def answer(self, now: Now) -> None:
        """Answer what can be answered."""
        self.stale = False
        if self._pulls:
            self._answer_pulls(now)
        if self._awaits:
            self._answer_awaits(now)
        self._streaming.clear()
        if self._finishes:
            self._answer_finishes(now)

    # --- a version that is being made

    def begin_streaming(self, version: int) -> bool:
        """A version is about to be made; True if a worker wants its shards by value, one by one."""
        self._streaming = {
            client for client, header in self._awaits.items() if header.step <= version and not client.by_reference
        }
        return bool(self._streaming)

    def stream(self, plan: Plan, owned: OwnedShard, version: int) -> None:
        """One shard of that version is made: send it on."""
        for client in list(self._streaming):
            if _is_wanted(owned, self._awaits[client]):
                self._send(plan, client.connection, owned, version, one_ahead=True)

    # --- answers

    def _answer_pulls(self, now: Now) -> None:
        for connection, asked in list(self._pulls.items()):
            waiting = [header for header in asked if not self._answer_pull(now, connection, header)]
            if waiting and connection in self._pulls:  # unless it was lost while it was answered
                self._pulls[connection] = waiting
            else:
                self._pulls.pop(connection, None)

    def _answer_pull(self, now: Now, connection: Connection, header: Header) -> bool:
        """False: the version is not there yet. Frozen shards stay at version 0 and are always ready."""
        owned = now.owned_shards[header.shard]
        is_there = now.version >= header.step
        if is_there and header.flags & Flag.STATE:
            self._send_state(now, connection, header)
        elif is_there and header.flags & Flag.AVERAGE:
            self._send_average(now, connection, owned)
        elif owned.shard.role is TensorRole.FROZEN:
            self._send(now.plan, connection, owned, 0)
        elif is_there:
            self._send(now.plan, connection, owned, now.version)
        else:
            return False
        return True

    def _answer_awaits(self, now: Now) -> None:
        for client, header in list(self._awaits.items()):
            version = now.answer_to(header)
            if version is not None:
                del self._awaits[client]
                self._bring(now, client, version, header, one_ahead=version == header.step)

    def _bring(self, now: Now, client: Client, version: int, asked: Header, *, one_ahead: bool) -> None:
        """By value or by reference, and then VERSION; buffers always go by value."""
        by_reference = client.by_reference and self._shows_parameters
        if client not in self._streaming:
            by_value = _BUFFERS if by_reference else _CHANGING
            for owned in now.changed if one_ahead else now.owned_shards.values():
                if owned.shard.role in by_value and _is_wanted(owned, asked):
                    self._send(now.plan, client.connection, owned, version, one_ahead=one_ahead)
        flags, memory, generation = Flag.NONE, None, self._parameters.generation
        if by_reference:
            flags = Flag.BY_REFERENCE
            memory = self._parameters.memory if client.generation != generation else None
            client.reading = version
            client.generation = generation
        plan = now.plan
        header = Header(Kind.VERSION, plan.term, plan.revision, version, asked.rank, flags=flags, memory=generation)
        self._connections.send(client.connection, header, memory=memory)

    def _answer_finishes(self, now: Now) -> None:
        waiting = []
        for connection, header in self._finishes:
            if now.committed >= header.step:
                durable = Header(Kind.DURABLE, now.plan.term, now.plan.revision, now.committed)
                self._journal.record("durable", term=now.plan.term, version=now.committed)
                self._connections.send(connection, durable)
                self.finished = now.committed
            else:
                waiting.append((connection, header))
        self._set_finishes(waiting)

    def _send_state(self, now: Now, connection: Connection, header: Header) -> None:
        """STATE: what a rank keeps in a shard; of no length where it keeps nothing yet."""
        state = now.owned_shards[header.shard].rank_states.get(header.rank)
        payload = memoryview(b"") if state is None else as_bytes(state)
        plan = now.plan
        answer = Header(Kind.STATE, plan.term, plan.revision, now.version, header.rank, header.shard, len(payload))
        self._connections.send(connection, answer, payload)

    def _send_average(self, now: Now, connection: Connection, owned: OwnedShard) -> None:
        """A copy: a step that does not wait for this worker may be made while it is on its way."""
        data = bytes(as_bytes(owned.slots[AVERAGE]))
        plan, shard = now.plan, owned.shard.index
        answer = Header(
            Kind.PARAMS, plan.term, plan.revision, now.version, shard=shard, length=len(data), flags=Flag.AVERAGE
        )
        self._connections.send(connection, answer, data)

    def _send(
        self, plan: Plan, connection: Connection, owned: OwnedShard, version: int, *, one_ahead: bool = False
    ) -> None:
        """A shard; for a worker that has the version before it, the movement will do."""
        moved = owned.movement if one_ahead else None
        data = as_bytes(owned.published if moved is None else moved)
        flags = Flag.NONE if moved is None else Flag.MOVEMENT
        header = Header(
            Kind.PARAMS, plan.term, plan.revision, version, shard=owned.shard.index, length=len(data), flags=flags
        )
        self._connections.send(connection, header, data)


def _is_wanted(owned: OwnedShard, asked: Header) -> bool:
    """Whether an AWAIT is for one of the stages that have a shard."""
    return any(asked.stages >> stage & 1 for stage in owned.shard.stages)
