"""Which samples a rank sees at a step, and with which random numbers: pure functions of (seed, step, rank).

This is what makes elasticity exact: any worker, at any time, can compute again what a rank computed. Nothing
is stored and nothing is shuffled: the place of a sample in an epoch's order is computed point by point.

The values are part of the format of a job: another order after an upgrade would change a resumed run. Golden
tests pin them.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

from psa_store.errors import UsageError
from psa_store.job.position import Reading

SAMPLES_MAX = 1 << 62

_ROUNDS = 6
_WINDOW = 256
"""Samples whose places are computed together: almost all of the time is that of the calls, not of the numbers."""
_MIX_A = np.uint64(0x9E3779B97F4A7C15)
_MIX_B = np.uint64(0xBF58476D1CE4E5B9)
_HALF_WORD = np.uint64(32)


def permute(index: NDArray[np.int64], n: int, key: int) -> NDArray[np.int64]:
    """Map indices in range(n) through a pseudo-random permutation of range(n), without ever holding it.

    A Feistel network over pairs (left, right) with index = left * width + right and both sizes near sqrt(n),
    whose rounds add a keyed hash of one half to the other. It permutes range(height * width), which is larger
    than n by less than sqrt(n) + 1; an image outside range(n) is mapped again until it falls inside (cycle
    walking), which keeps it a permutation and is rarely needed.

    Args:
        index: 1-D, values in range(n).
        n: 1..2**62.
        key: any int; another key gives another permutation.
    """
    if not 1 <= n <= SAMPLES_MAX:
        raise UsageError(f"n={n}: the number of samples must be between 1 and 2**62")
    if index.size and not (index.min() >= 0 and index.max() < n):
        raise UsageError(f"index: holds values outside range({n}), which a permutation of it cannot map")
    return _permute(index, n, _round_keys(key).repeat(index.size, axis=1))


class SampleOrder:
    """Which samples of a data set of ``n`` each rank computes at each step. Not thread-safe.

    All ranks together walk through a new permutation of the data set in every data epoch, ``batch_size``
    samples a step; a step may span the end of an epoch. The order is fixed by (seed, n): ``batch_size`` cuts
    it into steps, and the number of ranks cuts steps into shares.

    Args:
        batch_size: samples of all ranks together in one step; divisible by ``ranks``.

    Raises:
        UsageError: numbers that do not fit together; the message says which.
    """

    def __init__(self, seed: int, *, ranks: int, batch_size: int, n: int) -> None:
        if ranks < 1:
            raise UsageError(f"ranks={ranks}: at least one rank must compute")
        if n < 1:
            raise UsageError(f"n={n}: the data set is empty; give it at least one sample")
        if n > SAMPLES_MAX:
            raise UsageError(f"n={n}: the number of samples must be between 1 and 2**62")
        if batch_size < 1 or batch_size % ranks:
            raise UsageError(
                f"batch_size={batch_size} counts the samples of all ranks together and must be divisible by "
                f"ranks={ranks}: use {max(1, round(batch_size / ranks)) * ranks}, or another number of ranks"
            )
        self.reading = Reading(batch_size, n, n)
        """How a job reads that goes through this order from its first step on."""
        self._seed = seed
        self._ranks = ranks
        self._batch_size = batch_size
        self._n = n
        self._low = 0
        """The position of the first sample of the window, counted over all data epochs."""
        self._window: list[int] = []

    def indices(self, step: int, rank: int) -> list[int]:
        """The samples that ``rank`` computes at ``step``.

        Raises:
            UsageError: there is no such step or rank.
        """
        if not 0 <= rank < self._ranks:
            raise UsageError(f"rank={rank} with ranks={self._ranks}: rank must be one of 0..ranks-1")
        if step < 0:
            raise UsageError(f"step={step}: steps are counted from 0")
        share = self._batch_size // self._ranks
        return self.at(step * self._batch_size + rank * share, share)

    def at(self, position: int, count: int) -> list[int]:
        """The samples from this position on, which is counted over all data epochs."""
        low = position
        if not self._low <= low <= low + count <= self._low + len(self._window):
            self._low, self._window = low, self._order(low, low + max(count, _WINDOW))
        return self._window[low - self._low : low - self._low + count]

    def _order(self, position: int, end: int) -> list[int]:
        """The samples at these positions."""
        indices: list[NDArray[np.int64]] = []
        keys: list[NDArray[np.uint64]] = []
        while position < end:
            epoch, first = divmod(position, self._n)
            count = min(self._n - first, end - position)
            indices.append(np.arange(first, first + count))
            keys.append(_round_keys(_hash64(f"order/{self._seed}/{epoch}")).repeat(count, axis=1))
            position += count
        order: list[int] = _permute(np.concatenate(indices), self._n, np.concatenate(keys, axis=1)).tolist()
        return order


def sample_indices(seed: int, step: int, rank: int, *, ranks: int, batch_size: int, n: int) -> list[int]:
    """The samples of one step; see :class:`SampleOrder`, which is the way to ask for many."""
    return SampleOrder(seed, ranks=ranks, batch_size=batch_size, n=n).indices(step, rank)


def stream_seed(seed: int, step: int, rank: int, purpose: str) -> int:
    """A well-mixed 63-bit seed for the random numbers that ``rank`` draws at ``step`` for ``purpose``."""
    return _hash64(f"stream/{seed}/{step}/{rank}/{purpose}") >> 1


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _round_keys(key: int) -> NDArray[np.uint64]:
    """What the rounds add with this key, as a column."""
    digest = hashlib.blake2b(b"psa.permute:%d" % key, digest_size=8 * _ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64).reshape(_ROUNDS, 1)


def _permute(index: NDArray[np.int64], n: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """:func:`permute`, each index with the round keys in its own column."""
    width = math.isqrt(n - 1) + 1
    height = -(-n // width)
    image = _rounds(index.astype(np.uint64), height, width, keys)
    while (outside := image >= n).any():
        image[outside] = _rounds(image[outside], height, width, keys[:, outside])
    return image.astype(np.int64)


def _rounds(index: NDArray[np.uint64], height: int, width: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One pass through the network: a permutation of range(height * width)."""
    left, right = np.divmod(index, np.uint64(width))
    for i in range(0, _ROUNDS, 2):
        left = (left + _mix(right, keys[i]) % np.uint64(height)) % np.uint64(height)
        right = (right + _mix(left, keys[i + 1]) % np.uint64(width)) % np.uint64(width)
    return left * np.uint64(width) + right


def _mix(values: NDArray[np.uint64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A keyed hash of each value to 64 bits; arithmetic is modulo 2**64."""
    mixed = (values + key) * _MIX_A
    mixed ^= mixed >> _HALF_WORD
    mixed *= _MIX_B
    mixed ^= mixed >> _HALF_WORD
    return mixed


def rounding_stream(seed: int, step: int, rank: int, shard: int) -> int:
    """The random numbers with which ``rank`` rounds its gradient of ``shard`` at ``step``."""
    return stream_seed(seed, step, rank, f"compression/{shard}")
