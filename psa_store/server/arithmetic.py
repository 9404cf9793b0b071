"""The threads of a server that reduce gradients and update shards.

torch runs single-threaded in each of them and the parallelism is over shards, so that no bit depends on their number.
What they have done arrives at the engine as a letter; what went wrong, as :class:`Lost`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from psa_store.server.lead import Lead
from psa_store.server.letters import Lost, Reduced, ToEngine

_FORGET_DONE_AT = 1024


class Arithmetic:
    """Owns the pool ``psa-math``. Called by the engine's thread; ``post`` must be thread-safe."""

    def __init__(self, threads: int, post: Callable[[ToEngine], None]) -> None:
        self._threads = threads
        self._post = post
        self._pool = ThreadPoolExecutor(
            threads, thread_name_prefix="psa-math", initializer=torch.set_num_threads, initargs=(1,)
        )
        self._futures: set[Future[None]] = set()

    def reduce(self, epoch: int, lead: Lead, ranks: int) -> None:
        """Reduce the gradients of one shard, then post Reduced."""
        self._submit(epoch, lambda: self._post(Reduced(epoch, lead.shard.index, lead.reduce(ranks))))

    def on_all(self, epoch: int, leads: Sequence[Lead], work: Callable[[Lead], None], done: ToEngine) -> None:
        """Do ``work`` on every shard, then post ``done``."""
        parts = [leads[start :: self._threads] for start in range(min(self._threads, len(leads)))]
        if not parts:
            self._post(done)
            return
        latch = _Latch(len(parts), lambda: self._post(done))
        for part in parts:
            self._submit(epoch, _on_part(part, work, latch))

    def settle(self) -> None:
        """Wait until no thread touches the memory of any shard."""
        wait(self._futures)
        self._futures.clear()

    def close(self) -> None:
        self._pool.shutdown()

    def _submit(self, epoch: int, function: Callable[[], None]) -> None:
        if len(self._futures) >= _FORGET_DONE_AT:
            self._futures = {each for each in self._futures if not each.done()}
        future = self._pool.submit(function)
        self._futures.add(future)
        future.add_done_callback(lambda done: self._check(epoch, done))

    def _check(self, epoch: int, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._post(Lost(epoch, f"arithmetic failed: {error!r}"))


class _Latch:
    """Calls ``done`` when the last of ``count`` parts has called :meth:`release`."""

    def __init__(self, count: int, done: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._count = count
        self._done = done

    def release(self) -> None:
        with self._lock:
            self._count -= 1
            last = self._count == 0
        if last:
            self._done()


def _on_part(part: Sequence[Lead], work: Callable[[Lead], None], latch: _Latch) -> Callable[[], None]:
    def run() -> None:
        for lead in part:
            work(lead)
        latch.release()

    return run
