"""What workers wait for: shards by value, the next version, durability. Used by the event loop's thread only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from psa_store.cluster import Plan
from psa_store.job.layout import TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.tensors import as_bytes
from psa_store.server.client import Client
from psa_store.server.connections import Connections
from psa_store.server.shard import OwnedShard
from psa_store.server.shared_parameters import SharedParameters
from psa_store.testing.journal import Journal
from psa_store.wire import Connection, Flag, Header, Kind


@dataclass(frozen=True, slots=True)
class Now:
    """What there is to answer with."""

    plan: Plan
    version: int
    committed: int
    owned_shards: Mapping[int, OwnedShard]
    changed: Sequence[OwnedShard]
    """What the newest version changed: more than that is of no use to whoever has the one before."""
    shared_parameters: SharedParameters
    answer_to: Callable[[Header], int | None]
    """The version with which an AWAIT can be answered; None: not yet."""
    by_value: bool = False
    """Show nobody our memory, which changes while they compute."""


class Waiters:
    """Requests that are answered as soon as they can be."""

    def __init__(self, connections: Connections, wire: WireLayout, journal: Journal) -> None:
        self._connections = connections
        self._wire = wire
        self._journal = journal
        self._pulls: list[tuple[Connection, Header]] = []
        self._awaits: dict[Client, Header] = {}
        self._finishes: list[tuple[Connection, Header]] = []
        self.finished: int | None = None
        """The newest version of which somebody was told that it is durable, as workers ask at the end of a job."""
        self._streaming: set[Client] = set()
        """Workers that get the shards of the next version by value, one by one, while it is being made."""

    def pull(self, connection: Connection, header: Header) -> None:
        """PULL: one shard by value, at ``header.step`` or later."""
        self._pulls.append((connection, header))

    def wait(self, client: Client, header: Header) -> None:
        """AWAIT: everything, at ``header.step`` or later."""
        self._awaits[client] = header

    def finish(self, connection: Connection, header: Header) -> None:
        """FINISH: tell when ``header.step`` is durable."""
        self._finishes.append((connection, header))

    def finish_is_due(self, version: int) -> bool:
        """Whether somebody waits for this version or an older one to become durable."""
        return any(header.step <= version for _, header in self._finishes)

    def finishes(self) -> set[int]:
        """The versions of which somebody waits for that they become durable."""
        return {header.step for _, header in self._finishes}

    def clear(self) -> None:
        self._pulls.clear()
        self._awaits.clear()
        self._finishes.clear()
        self._streaming.clear()

    def forget(self, connection: Connection) -> None:
        """Nobody waits at this connection any more."""
        self._pulls = [each for each in self._pulls if each[0] is not connection]
        self._finishes = [each for each in self._finishes if each[0] is not connection]
        for client in [each for each in self._awaits if each.connection is connection]:
            del self._awaits[client]
            self._streaming.discard(client)

    def answer(self, now: Now) -> None:
        """Answer what can be answered."""
        self._answer_pulls(now)
        self._answer_awaits(now)
        self._answer_finishes(now)

    # --- a version that is being made

    def begin_streaming(self, version: int) -> bool:
        """A version is about to be made; True if somebody wants its shards by value, one by one."""
        self._streaming = {
            client for client, header in self._awaits.items() if header.step <= version and not client.by_reference
        }
        return bool(self._streaming)

    def stream(self, plan: Plan, owned: OwnedShard, version: int) -> None:
        """One shard of that version is made: send it on."""
        for client in list(self._streaming):
            self._send(plan, client.connection, owned, version, one_ahead=True)

    # --- answers

    def _answer_pulls(self, now: Now) -> None:
        """Frozen shards stay at version 0 and are always ready."""
        waiting, self._pulls = self._pulls, []
        for connection, header in waiting:
            owned = now.owned_shards[header.shard]
            if now.version >= header.step and header.flags & Flag.STATE:
                self._send_state(now, connection, header)
            elif owned.shard.role is TensorRole.FROZEN:
                self._send(now.plan, connection, owned, 0)
            elif now.version >= header.step:
                self._send(now.plan, connection, owned, now.version)
            else:
                self._pulls.append((connection, header))

    def _answer_awaits(self, now: Now) -> None:
        for client, header in list(self._awaits.items()):
            version = now.answer_to(header)
            if version is not None:
                del self._awaits[client]
                one_ahead = version == header.step
                self._bring(now, client, version, header.rank, one_ahead=one_ahead)
        self._streaming.clear()

    def _bring(self, now: Now, client: Client, version: int, rank: int, *, one_ahead: bool) -> None:
        """By value or by reference, and then VERSION; buffers always go by value."""
        by_reference = client.by_reference and not now.by_value
        if client not in self._streaming:
            by_value = [TensorRole.BUFFER] if by_reference else [TensorRole.TRAINED, TensorRole.BUFFER]
            for owned in now.changed if one_ahead else now.owned_shards.values():
                if owned.shard.role in by_value:
                    self._send(now.plan, client.connection, owned, version, one_ahead=one_ahead)
        flags, memory, generation = Flag.NONE, None, now.shared_parameters.generation
        if by_reference:
            flags = Flag.BY_REFERENCE
            memory = now.shared_parameters.memory if client.generation != generation else None
            client.reading = version
            client.generation = generation
        plan = now.plan
        header = Header(Kind.VERSION, plan.term, plan.revision, version, rank, flags=flags, memory=generation)
        self._connections.send(client.connection, header, memory=memory)

    def _answer_finishes(self, now: Now) -> None:
        waiting, self._finishes = self._finishes, []
        for connection, header in waiting:
            if now.committed >= header.step:
                durable = Header(Kind.DURABLE, now.plan.term, now.plan.revision, now.committed)
                self._journal.record("durable", term=now.plan.term, version=now.committed)
                self._connections.send(connection, durable)
                self.finished = now.committed
            else:
                self._finishes.append((connection, header))

    def _send_state(self, now: Now, connection: Connection, header: Header) -> None:
        """STATE: what a rank carries in a shard; of no length where it carries nothing yet."""
        state = now.owned_shards[header.shard].rank_states.get(header.rank)
        payload = memoryview(b"") if state is None else as_bytes(state)
        plan = now.plan
        answer = Header(Kind.STATE, plan.term, plan.revision, now.version, header.rank, header.shard, len(payload))
        self._connections.send(connection, answer, payload)

    def _send(
        self, plan: Plan, connection: Connection, owned: OwnedShard, version: int, *, one_ahead: bool = False
    ) -> None:
        """A shard; to who has the version before it, the movement will do."""
        moved = owned.movement if one_ahead else None
        data = as_bytes(owned.published if moved is None else moved)
        flags = Flag.NONE if moved is None else Flag.MOVEMENT
        header = Header(
            Kind.PARAMS, plan.term, plan.revision, version, shard=owned.shard.index, length=len(data), flags=flags
        )
        self._connections.send(connection, header, data)
