"""What becomes of a gradient that a worker offers: judged once, with its header in hand and before its bytes are read.

    PARK           its turn has not come: nothing more is read from that worker until it has
    Take           it is wanted: here is where its bytes go
    TakeReference  it is wanted, and lies in memory that the worker shares
    Drop           it is not wanted, or not allowed: its bytes are discarded

The decision is kept until the last byte is here, and is carried out then. Meanwhile it can become Drop: the term ends,
the rank goes to another worker, or the same gradient comes over another connection.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from psa_store.cluster import Plan
from psa_store.compression.codec import decode
from psa_store.consistency import Offer
from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.note import PLAIN, GradientNote, from_marks
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.tensors import as_bytes
from psa_store.server.aggregator import Aggregator, Rules
from psa_store.server.clients import Client
from psa_store.wire import DISCARD, PARK, Connection, Flag, Header, Park, Place, Reason

_NOTHING = memoryview(b"")


@dataclass(frozen=True, slots=True)
class Take:
    """Receive one shard into ``memory``.

    ``place``: the memory of the gradient; None if the push brings only state. Without ``encoded`` it is ``memory``.
    ``encoded``: what arrives is not only a gradient as it is: ``state_bytes`` of its rank's state follow, and then
    ``mark_bytes`` of marks, see :mod:`psa_store.optim.note`.
    """

    shard: int
    rank: int
    memory: memoryview
    place: Tensor | None
    encoded: Tensor | None
    state_bytes: int
    mark_bytes: int

    @property
    def shards(self) -> Iterable[int]:
        return (self.shard,)


@dataclass(frozen=True, slots=True)
class TakeReference:
    """The gradients of these shards lie in shared memory. ``marks``: what comes, if anything, by shard its part of
    it, in ``memory``."""

    rank: int
    gradients: Sequence[tuple[int, Tensor]]
    marks: Mapping[int, memoryview]
    memory: memoryview

    @property
    def shards(self) -> Iterable[int]:
        return (shard for shard, _ in self.gradients)


@dataclass(frozen=True, slots=True)
class Drop:
    """``reason``: what to tell the worker; NONE for nothing, since the gradient is here already."""

    reason: Reason


class _Form:
    """In which form pushes of one shard come, computed once."""

    def __init__(self, config: JobConfig, layout: Layout, wire: WireLayout, shard: Shard) -> None:
        trained = shard.role is TensorRole.TRAINED
        state = rank_state_of(config, shard)
        self.trained = trained
        self.compressed = trained and config.compression.applies_to(shard.dtype)
        self.gradient_bytes = (
            config.compression.payload_bytes(shard.numel) if self.compressed else wire.size_bytes(shard)
        )
        self.state_bytes = state.size_bytes if state is not None else 0
        self.mark_bytes = len(shard.pieces)
        self.bytes_max = max(shard.size_bytes, self.gradient_bytes) + self.state_bytes + self.mark_bytes
        self.why_no_reference = ""
        if self.compressed:
            self.why_no_reference = "this job compresses its gradients"
        elif not trained:
            self.why_no_reference = "only gradients are pushed so"


class PushAdmission:
    """Judges pushes, and keeps each decision until it is carried out. Used by the event loop's thread only."""

    def __init__(self, config: JobConfig, layout: Layout, wire: WireLayout, rules: Rules) -> None:
        self._config = config
        self._compression = config.compression
        self._ranks = config.ranks
        self._rules = rules
        self._shares_memory = config.shares_memory
        self._frozen = frozenset(shard.index for shard in layout.shards_of(TensorRole.FROZEN))
        self._forms = [_Form(config, layout, wire, shard) for shard in layout.shards]
        marks_max = sum(form.mark_bytes for form in self._forms)
        self._bytes_max = max(marks_max, *(form.bytes_max for form in self._forms))
        self._layout = layout
        self._decided: dict[Connection, Take | TakeReference | Drop] = {}

    def admit(self, aggregator: Aggregator, connection: Connection, client: Client | None, header: Header) -> Place:
        """Judge a push; returns where its bytes go.

        Raises:
            Refused: no correct worker sends this.
        """
        decision = self._judge(aggregator, connection, client, header)
        if isinstance(decision, Park):
            return decision
        if isinstance(decision, Drop):
            if header.length > self._bytes_max:
                raise Refused(f"PUSH of {header.length} bytes; no shard is larger than {self._bytes_max}")
            self._decided[connection] = decision
            return DISCARD
        if self._decided:
            for shard in decision.shards:
                self._divert_former(shard, header.rank, connection)
        self._decided[connection] = decision
        return decision.memory

    def finish(self, aggregator: Aggregator | None, connection: Connection, header: Header) -> Reason:
        """Carry out what was decided, now that all bytes are here; returns what to tell the worker."""
        decision = self._decided.pop(connection)
        if isinstance(decision, Drop):
            return decision.reason
        assert aggregator is not None
        finite = Flag.NONFINITE not in header.flags
        if isinstance(decision, TakeReference):
            plain = not decision.marks and header.weight == 1.0
            for shard, gradient in decision.gradients:
                note = PLAIN if plain else self._note(header, shard, decision.marks.get(shard))
                aggregator.accept(header, shard, gradient, note=note, finite=finite)
            return Reason.NONE
        place, encoded, state, marks = decision.place, decision.encoded, None, None
        if encoded is not None and decision.mark_bytes:
            marks = as_bytes(encoded)[-decision.mark_bytes :]
            encoded = encoded[: -decision.mark_bytes]
        if encoded is not None:
            gradient_bytes = len(encoded) - decision.state_bytes
            if place is not None and self._forms[decision.shard].compressed:
                decode(self._compression, encoded[:gradient_bytes], place)
            elif place is not None:
                place.view(torch.uint8).copy_(encoded[:gradient_bytes])
            state = encoded[gradient_bytes:].clone() if decision.state_bytes else None
        note = self._note(header, decision.shard, marks)
        aggregator.accept(header, decision.shard, place, state, note, finite=finite)
        return Reason.NONE

    def _note(self, header: Header, shard: int, marks: memoryview | None) -> GradientNote:
        if marks is None and header.weight == 1.0:
            return PLAIN
        absent = frozenset[int]() if marks is None else from_marks(marks, self._layout.shards[shard])
        return GradientNote(header.weight, absent)

    # --- while bytes come

    def revise(self, plan: Plan, version: int) -> None:
        """Ranks may have gone to other workers: what is still to come of their gradients is not wanted.

        ``version``: the newest, of whose step those are.
        """
        for connection, decision in self._decided.items():
            if isinstance(decision, Drop):
                continue
            if not self._may_push(plan, version, decision.rank, decision.shards, connection):
                self._divert(connection, Reason.NOT_HOLDER)

    def end(self) -> None:
        """The term is over, and the places of its shards are not to be touched any more."""
        for connection, decision in self._decided.items():
            if not isinstance(decision, Drop):
                self._divert(connection, Reason.STALE)

    def forget(self, connection: Connection) -> None:
        """The connection is closed."""
        self._decided.pop(connection, None)

    def _divert_former(self, shard: int, rank: int, connection: Connection) -> None:
        """The same gradient is being received already: what is still to come of it is not wanted.

        Where workers race with it, it is received once from each of them.
        """
        for former, decision in self._decided.items():
            same = isinstance(decision, Take) and (decision.shard, decision.rank) == (shard, rank)
            if same and not (self._rules.workers_race and former.member != connection.member):
                self._divert(former, Reason.NONE)

    def _divert(self, connection: Connection, reason: Reason) -> None:
        connection.divert()
        self._decided[connection] = Drop(reason)

    # --- judging

    def _judge(
        self, aggregator: Aggregator, connection: Connection, client: Client | None, header: Header
    ) -> Take | TakeReference | Drop | Park:
        by_reference = Flag.BY_REFERENCE in header.flags
        shards = range(header.shard, header.shard + (header.shards if by_reference else 1))
        if by_reference and not 0 < header.shards <= len(self._forms) - header.shard:
            raise Refused(f"PUSH of {header.shards} shards from shard {header.shard}: there are not so many")
        if not self._rules.skips_nonfinite and Flag.NONFINITE in header.flags:
            raise Refused("PUSH of a gradient with NaN or Inf, which this job does not skip")
        if not 0.0 <= header.weight < math.inf:
            raise Refused(f"PUSH of weight {header.weight}")
        reason = self._reason_against(aggregator, connection, header, shards)
        if reason is not None:
            return Drop(reason)
        offers = aggregator.offers(header, shards)
        if Offer.AHEAD in offers:
            if not self._rules.on_arrival:
                raise Refused(f"PUSH for step {header.step} while version {aggregator.version} is the newest")
            return PARK
        wanted = [shard for shard, offer in zip(shards, offers, strict=True) if offer is Offer.NEW]
        if by_reference:
            return self._referred(client, header, shards, wanted)
        gradient_bytes, state_bytes = self._bytes_due(aggregator, header)
        mark_bytes = self._mark_bytes(header, shards)
        due = gradient_bytes + state_bytes + mark_bytes
        if header.length != due:
            raise Refused(f"PUSH of {header.length} bytes for shard {header.shard} of {due}")
        if not wanted:
            return Drop(Reason.NONE)
        return self._received(aggregator, header, gradient_bytes, state_bytes, mark_bytes)

    def _reason_against(
        self, aggregator: Aggregator, connection: Connection, header: Header, shards: range
    ) -> Reason | None:
        if header.term < aggregator.plan.term:
            return Reason.STALE
        if not set(shards) <= aggregator.owned_shards.keys():
            return Reason.NOT_OWNER
        plan, step, rank = aggregator.plan, header.step, header.rank
        if rank >= self._ranks or not self._may_push(plan, step, rank, shards, connection):
            return Reason.NOT_HOLDER
        if not self._frozen.isdisjoint(shards):
            raise Refused(f"PUSH of shards {sorted(self._frozen.intersection(shards))}, which never change")
        return None

    def _may_push(self, plan: Plan, step: int, rank: int, shards: Iterable[int], connection: Connection) -> bool:
        """Whether the plan gives the cells of these shards to this worker, or allows it to be faster."""
        stages = {self._layout.shards[shard].home for shard in shards} if plan.stages > 1 else (0,)
        return all(plan.holder(rank, stage, step) == connection.member for stage in stages) or (
            self._rules.workers_race and connection.member in plan.cells
        )

    def _bytes_due(self, aggregator: Aggregator, header: Header) -> tuple[int, int]:
        """What a push of this shard has to bring: bytes of gradient (or buffers), bytes of a rank's state."""
        form = self._forms[header.shard]
        due = form.state_bytes and (header.flags & Flag.STATE or self._config.rank_state_is_due(header.step + 1))
        exchanged = not form.trained or aggregator.exchanges(header.shard, header.step)
        return form.gradient_bytes if exchanged else 0, form.state_bytes if due else 0

    def _mark_bytes(self, header: Header, shards: Sequence[int]) -> int:
        """The bytes of marks that come with a push."""
        if Flag.ABSENT not in header.flags:
            return 0
        if not all(self._forms[shard].trained for shard in shards):
            raise Refused(f"PUSH of shard {header.shard} says of parameters what is none")
        return sum(self._forms[shard].mark_bytes for shard in shards)

    def _received(
        self, aggregator: Aggregator, header: Header, gradient_bytes: int, state_bytes: int, mark_bytes: int
    ) -> Take:
        place = aggregator.owned_shards[header.shard].own_place(header.rank) if gradient_bytes else None
        as_it_is = place is not None and header.length == gradient_bytes and not self._forms[header.shard].compressed
        if place is not None and as_it_is and not self._rules.workers_race:
            return Take(header.shard, header.rank, as_bytes(place), place, None, 0, 0)
        encoded = torch.empty(header.length, dtype=torch.uint8)
        return Take(header.shard, header.rank, as_bytes(encoded), place, encoded, state_bytes, mark_bytes)

    def _referred(
        self, client: Client | None, header: Header, shards: Sequence[int], wanted: Iterable[int]
    ) -> TakeReference:
        if not self._shares_memory:
            raise Refused("PUSH by reference: in this job's mode no memory is shared")
        if client is None:
            raise Refused("only a worker that said HELLO may do that")
        for shard in shards:
            if self._forms[shard].why_no_reference:
                raise Refused(f"PUSH of shard {shard} by reference: {self._forms[shard].why_no_reference}")
        gradients = client.gradients.get(header.memory)
        if gradients is None:
            raise Refused(f"PUSH from memory {header.memory}, which was not shared")
        taken = [(shard, gradients[shard]) for shard in wanted]
        if header.length != self._mark_bytes(header, shards):
            raise Refused(f"PUSH by reference of {header.length} bytes: not marks of its shards")
        if not header.length:
            return TakeReference(header.rank, taken, {}, _NOTHING)
        memory, marks, low = memoryview(bytearray(header.length)), {}, 0
        for shard in shards:
            marks[shard] = memory[low : low + self._forms[shard].mark_bytes]
            low += self._forms[shard].mark_bytes
        return TakeReference(header.rank, taken, marks, memory)
