"""What members of a job ask of a server, and what servers tell each other, besides gradients: AWAIT, PULL, FINISH,
CLOCKS, CUT, NORM. Used by the event loop's thread only.
"""

from __future__ import annotations

import numpy as np

from psa_store.consistency.instructions import NormsTold, RankCut
from psa_store.errors import Refused
from psa_store.server.aggregator import Aggregator
from psa_store.server.clients import Client
from psa_store.server.waiters import Waiters
from psa_store.wire import Connection, Header, Kind, Reason

_NUMBER_BYTES = 8


class Unfit(Exception):
    """The request does not fit the plan: the member is told to read it again. ``reason``: what to answer."""

    def __init__(self, reason: Reason, why: str) -> None:
        super().__init__(why)
        self.reason = reason


class Requests:
    """``ranks``: world size of the job."""

    def __init__(self, ranks: int, waiters: Waiters) -> None:
        self._ranks = ranks
        self._waiters = waiters

    def on_request(
        self, aggregator: Aggregator, connection: Connection, client: Client | None, header: Header, payload: memoryview
    ) -> None:
        """Carry out a request of this term, or note it for later.

        Raises:
            Unfit: it is for another plan.
            Refused: no correct member sends this.
        """
        if header.term < aggregator.plan.term:
            if header.kind is Kind.NORM:
                return  # said before the other server knew
            raise Unfit(Reason.STALE, "the term is over")
        match header.kind:
            case Kind.AWAIT:
                self._check_rank(header)
                if client is None:
                    raise Refused("only a worker that said HELLO may do that")
                self._waiters.wait(client, header)
            case Kind.FINISH:
                self._waiters.finish(connection, header)
            case Kind.PULL:
                if header.shard not in aggregator.owned_shards:
                    raise Unfit(Reason.NOT_OWNER, f"shard {header.shard} is owned elsewhere")
                self._waiters.pull(connection, header)
            case Kind.CLOCKS:
                aggregator.send_clocks(connection)
            case Kind.CUT:
                self._check_rank(header)
                if aggregator.plan.ranks[header.rank] != connection.member:
                    raise Unfit(Reason.NOT_HOLDER, f"rank {header.rank} is held by another worker")
                aggregator.on_rank_cut(RankCut(header.barrier, header.rank, header.step))
            case Kind.NORM:
                aggregator.on_norms(self._norms(aggregator, connection, header, payload))

    def _check_rank(self, header: Header) -> None:
        if header.rank >= self._ranks:
            raise Refused(f"{header.kind.name} of rank {header.rank}, and there are {self._ranks}")

    def _norms(self, aggregator: Aggregator, connection: Connection, header: Header, payload: memoryview) -> NormsTold:
        if header.length % (2 * _NUMBER_BYTES):
            raise Refused(f"NORM of {header.length} bytes: not pairs of numbers")
        pairs = np.frombuffer(payload, dtype="<f8").reshape(-1, 2)
        norms = {int(shard): float(norm) for shard, norm in pairs if np.isfinite(shard)}
        if not norms.keys() <= set(aggregator.plan.shards_of(connection.member)):
            raise Refused(f"NORM of shards that {connection.member} does not own")
        return NormsTold(header.step, norms)
