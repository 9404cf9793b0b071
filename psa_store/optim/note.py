"""What a rank says of its gradient beside the numbers: how much it counts, and which parameters got none.

Pure, and without torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from psa_store.errors import UsageError
from psa_store.job.config import JobConfig
from psa_store.job.layout import Shard


class GradientNote(NamedTuple):
    """``weight``: of the rank in the mean over ranks; 0: it is left out. ``absent``: tensors that got no gradient.

    A tensor that no rank gave a gradient is not updated, as in ``torch.optim``: no decay, no momentum, no step count.
    One that some ranks gave a gradient counts as zero in the others.
    """

    weight: float = 1.0
    absent: frozenset[int] = frozenset()


def checked_weight(weight: float, config: JobConfig) -> float:
    """Return a rank's weight as float32 has it, in which it travels; raises UsageError if it can be none."""
    rounded: float
    try:
        (rounded,) = struct.unpack("<f", struct.pack("<f", weight))
    except (struct.error, OverflowError, TypeError, ValueError, RuntimeError):  # the last are a tensor's
        rounded = math.nan
    if not 0.0 <= rounded < math.inf:
        raise UsageError(f"worker.step(weight={weight!r}): must be a number that is not negative")
    if rounded not in (0.0, 1.0) and not config.weighs_ranks:
        raise UsageError(
            f"worker.step(weight={weight!r}): in mode {config.mode} no gradients of ranks are averaged, so they "
            "have no weights; use mode sync, or scale the loss"
        )
    return rounded


PLAIN = GradientNote()
"""Of a rank that counts as any other, and has a gradient for all."""


def left_out(notes: Sequence[GradientNote], tensors: Iterable[int]) -> frozenset[int]:
    """Those of ``tensors`` that no rank gave a gradient; ``notes``: of all ranks."""
    counting = [note.absent for note in notes if note.weight > 0.0]
    return frozenset(tensors).intersection(*counting)


def to_marks(absent: Collection[int], shard: Shard) -> bytes:
    """One byte for each piece of a shard, as it travels: 1 where the tensor got no gradient."""
    return bytes(piece.tensor in absent for piece in shard.pieces)


def from_marks(marks: memoryview | bytes, shard: Shard) -> frozenset[int]:
    """Read :func:`to_marks` back."""
    return frozenset(piece.tensor for piece, mark in zip(shard.pieces, marks, strict=True) if mark)
