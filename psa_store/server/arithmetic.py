"""The threads of a server that reduce gradients and update shards.

torch runs single-threaded in each of them and the parallelism is over shards, so that no bit depends on their number.
What they have done arrives at the engine as a letter; what went wrong, as :class:`Lost`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from psa_store.optim.kernels import make_scratch
from psa_store.server.lead import Lead
from psa_store.server.letters import Lost, Measured, ToEngine

ShardWork = Callable[[Lead, Tensor], None]
"""What to do with one shard; the tensor is the thread's scratch memory."""
_FORGET_DONE_AT = 1024


class Arithmetic:
    """Owns the pool ``psa-math``. Called by the engine's thread; ``post`` must be thread-safe."""

    def __init__(self, threads: int, post: Callable[[ToEngine], None]) -> None:
        self._threads = threads
        self._post = post
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="psa-math", initializer=self._begin_thread)
        self._futures: set[Future[None]] = set()

    def _begin_thread(self) -> None:
        torch.set_num_threads(1)
        self._own.scratch = make_scratch()

    def measure(self, epoch: int, lead: Lead, ranks: int) -> None:
        """Compute the norm of one shard's gradient, then post Measured."""
        self._submit(
            epoch,
            lambda scratch: self._post(Measured(epoch, lead.shard.index, lead.squared_norm(ranks, scratch))),
        )

    def on_all(self, epoch: int, leads: Sequence[Lead], work: ShardWork, done: ToEngine) -> None:
        """Do ``work(lead, scratch)`` on every shard, then post ``done``."""
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

    def _submit(self, epoch: int, function: Callable[[Tensor], None]) -> None:
        if len(self._futures) >= _FORGET_DONE_AT:
            self._futures = {each for each in self._futures if not each.done()}
        future = self._pool.submit(lambda: function(self._own.scratch))
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


def _on_part(part: Sequence[Lead], work: ShardWork, latch: _Latch) -> Callable[[Tensor], None]:
    def run(scratch: Tensor) -> None:
        for lead in part:
            work(lead, scratch)
        latch.release()

    return run
