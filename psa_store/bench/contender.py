"""One thing that is measured, as the driver sees it: a few processes that do blocks of steps together."""

from __future__ import annotations

from collections.abc import Sequence

from psa_store.bench.children import Child, Command
from psa_store.errors import UserCodeFailed


class Contender:
    """Processes that are set up and wait for commands. Made of those that were started: waits until workers are set up.

    Args:
        name: as it stands in the tables.
        workers: those that do steps; all are told the same.
        servers: those that help, and end when the workers have left and SIGTERM comes.
    """

    def __init__(self, name: str, workers: Sequence[Child], servers: Sequence[Child] = ()) -> None:
        self.name = name
        self._workers = workers
        self.servers = list(servers)
        for worker in workers:
            worker.answer()

    def block(self, steps: int) -> float:
        """Do steps, and one more that is not timed before them; returns seconds per step, of the slowest worker."""
        for worker in self._workers:
            worker.tell(steps)
        answers = [worker.answer() for worker in self._workers]
        return (max(each.end_s for each in answers) - min(each.begin_s for each in answers)) / steps

    def check(self) -> None:
        """Have every worker prove its parameters; raises UserCodeFailed if they are wrong."""
        for worker in self._workers:
            worker.tell(Command.CHECK)
        for worker in self._workers:
            try:
                worker.answer()
            except UserCodeFailed as error:
                raise UserCodeFailed(f"{self.name} does other work than the rest: {error}") from error

    def leave(self) -> None:
        """End in order, workers first."""
        for worker in self._workers:
            worker.tell(Command.LEAVE)
        for worker in self._workers:
            worker.join()
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.join()
