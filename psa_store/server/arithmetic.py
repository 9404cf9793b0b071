"""The threads of a server that measure gradients and update shards.

torch runs single-threaded in each of them and the parallelism is over shards, so that no bit depends on their number.
What they have done arrives at the event loop as :class:`Done`; what went wrong, as :class:`Lost`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial

import torch
from torch import Tensor

from psa_store.consistency.instructions import Measured
from psa_store.optim.kernels import make_scratch
from psa_store.server.messages import Done, Lost, ToEventLoop
from psa_store.server.shard import OwnedShard

ShardWork = Callable[[OwnedShard, Tensor], None]
"""What to do with one shard; the tensor is the thread's scratch memory."""

_FORGET_DONE_AT = 1024


class Arithmetic:
    """Owns the pool ``psa-math``. Called by the event loop's thread; ``post`` must be thread-safe."""

    def __init__(self, threads: int, post: Callable[[ToEventLoop], None]) -> None:
        self._threads = threads
        self._post = post
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="psa-math")
        self._futures: set[Future[None]] = set()

    def measure(self, term: int, owned_shards: Sequence[OwnedShard]) -> None:
        """Compute the norms of the shards' gradients, then post Measured, in several messages perhaps."""

        def run(part: Sequence[OwnedShard]) -> None:
            scratch = self._scratch()
            self._post(Done(term, Measured({owned.shard.index: owned.squared_norm(scratch) for owned in part})))

        for part in self._shares(owned_shards):
            self._submit(term, partial(run, part))

    def on_all(
        self,
        term: int,
        owned_shards: Sequence[OwnedShard],
        work: ShardWork,
        done: ToEventLoop,
        *,
        each: Callable[[OwnedShard], None] | None = None,
    ) -> None:
        """Do ``work(owned, scratch)`` on every shard, and then ``each(owned)``; when all is done, post ``done``."""

        def run(part: Sequence[OwnedShard]) -> None:
            scratch = self._scratch()
            for owned in part:
                work(owned, scratch)
                if each is not None:
                    each(owned)
            latch.release()

        shares = self._shares(owned_shards)
        latch = _Latch(len(shares), lambda: self._post(done))
        for part in shares:
            self._submit(term, partial(run, part))

    def settle(self) -> None:
        """Wait until no thread touches the memory of any shard."""
        wait(self._futures)
        self._futures.clear()

    def close(self) -> None:
        self._pool.shutdown()

    def _shares(self, owned_shards: Sequence[OwnedShard]) -> list[Sequence[OwnedShard]]:
        """The shards that each thread does, all from front to back; one share, perhaps empty, at least."""
        threads = max(1, min(self._threads, len(owned_shards)))
        return [owned_shards[start::threads] for start in range(threads)]

    def _submit(self, term: int, function: Callable[[], None]) -> None:
        if len(self._futures) >= _FORGET_DONE_AT:
            self._futures = {each for each in self._futures if not each.done()}
        future = self._pool.submit(function)
        self._futures.add(future)
        future.add_done_callback(lambda done: self._check(term, done))

    def _scratch(self) -> Tensor:
        """The scratch memory of the calling thread."""
        scratch: Tensor | None = getattr(self._own, "scratch", None)
        if scratch is None:
            torch.set_num_threads(1)
            scratch = self._own.scratch = make_scratch()
        return scratch

    def _check(self, term: int, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            self._post(Lost(term, f"arithmetic failed: {error!r}"))


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
