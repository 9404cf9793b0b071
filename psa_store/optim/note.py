"""What a rank says of its gradient beside the numbers: how much it counts, and which parameters got none.

Pure, and without torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from psa_store.job.layout import Shard


class GradientNote(NamedTuple):
    """``weight``: of the rank in the mean over ranks; 0: it is left out. ``absent``: tensors that got no gradient.

    A tensor that no rank gave a gradient is not updated, as in ``torch.optim``: no decay, no momentum, no step count.
    One that some ranks gave a gradient counts as zero in the others.
    """

    weight: float = 1.0
    absent: frozenset[int] = frozenset()


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
