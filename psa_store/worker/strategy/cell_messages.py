"""What cells of a rank send each other, through the relay of a server."""

from __future__ import annotations

from psa_store.cluster import Cell, Server
from psa_store.worker.batches import RankStep
from psa_store.worker.carry import Parcel
from psa_store.worker.server_connections import ServerConnections
from psa_store.worker.session import PlanSession


class CellMessages:
    """Those of the cells of ``rank_step``."""

    rank_step: RankStep

    def __init__(self, servers: ServerConnections, session: PlanSession) -> None:
        self._servers = servers
        self._session = session

    def want(self, stage: int) -> None:
        """Have what is for a cell sent here, what was sent before as well."""
        step, rank = self.rank_step.step, self.rank_step.rank
        self._servers.want(self._relay_of(stage).id, step, Cell(rank, stage))

    def send(self, stage: int, microbatch: int, backward: bool, parcel: Parcel) -> None:
        """Send something to a cell."""
        step, rank = self.rank_step.step, self.rank_step.rank
        self._servers.relay(self._relay_of(stage).id, step, Cell(rank, stage), microbatch, backward, parcel)

    def _relay_of(self, stage: int) -> Server:
        """The server through which a cell gets what others send it: equal in all workers."""
        servers = self._session.plan.servers
        return servers[(self.rank_step.rank + stage) % len(servers)]
