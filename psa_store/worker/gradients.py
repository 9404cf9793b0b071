"""The memory that gradients are written to and sent from: one for each rank that is computed in a step.

A server of this host reads a gradient where it lies, until the step is over. So memory of which a push has been
announced is not written again before the next version is here (or, on arrival, the push is durable), and is given up,
not used again, when the connections were lost meanwhile: a server may still hold what was pushed from it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.note import PLAIN
from psa_store.optim.reduce import clip_factor, squared_norm
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.wire import SharedMemory

NORM_SURELY_FINITE = 1e18
"""Above it, the float32 sum of squares may overflow although every element is finite."""
_ELEMENT_MAX = 1e33
"""A larger element counts as not finite: the sum over 65536 ranks must not overflow float32."""


class GradientMemory:
    """One rank's gradient, in the places of ``wire``."""

    def __init__(self, layout: Layout, wire: WireLayout) -> None:
        self.shared = SharedMemory.create("gradient", wire.gradient_bytes)
        self.passed = False
        """Whether a server has its descriptor."""
        self.note = PLAIN
        """What is said of this gradient beside its numbers."""
        self._layout = layout
        self._after_step = self.shared.copy_on_write()

        def cut(flat: Tensor, low: int, dtype: str, numel: int) -> Tensor:
            return flat[low : low + numel * ITEM_BYTES[dtype]].view(to_torch(dtype))

        def tensors_of(flat: Tensor) -> list[Tensor | None]:
            return [
                cut(flat, wire.tensor_offset_bytes(i), wire.tensor_dtype(i), spec.numel).view(spec.shape).data
                if spec.role is TensorRole.TRAINED
                else None
                for i, spec in enumerate(layout.tensors)
            ]

        own = torch.frombuffer(self.shared.buffer, dtype=torch.uint8)
        self.views = tensors_of(own)
        """By tensor of the layout; None for those that are not trained. Each has a version counter of its own."""
        self.views_after_step = tensors_of(torch.frombuffer(self._after_step.buffer, dtype=torch.uint8))
        """The same gradient, for the model once it is handed over: what a script writes there changes nothing here."""
        self.numbers = {
            shard.index: cut(own, wire.offset_bytes(shard), wire.dtype(shard), shard.numel)
            for shard in layout.shards_of(TensorRole.TRAINED)
        }
        """By trained shard: its gradient, flat."""

    def begin(self) -> None:
        """Get ready for another gradient."""
        self.note = PLAIN
        self._after_step.forget()

    def bytes_of(self, shard: int) -> memoryview:
        """The bytes of a shard's gradient, to send."""
        return as_bytes(self.numbers[shard])

    def fingerprint(self, shard: int) -> int:
        """A digest of a shard's gradient; the same computation gives the same everywhere."""
        return xxh3_64_intdigest(self.bytes_of(shard), seed=shard)

    def flaw(self, shard: int) -> str:
        """The name of the first parameter in this shard whose gradient is not finite; empty if all is well."""
        flat = self.numbers[shard]
        if float(torch.linalg.vector_norm(flat)) < NORM_SURELY_FINITE:
            return ""
        bad = ~(flat.abs() < _ELEMENT_MAX)  # true for NaN
        return self._layout.tensor_at(self._layout.shards[shard], int(bad.nonzero()[0])) if bool(bad.any()) else ""

    def first_flaw(self) -> str:
        """The same for all shards."""
        return next(filter(None, map(self.flaw, self.numbers)), "")

    def clip_factor(self, norm_max: float) -> float:
        """What to multiply the gradient by so that its global norm is at most ``norm_max``."""
        return clip_factor([squared_norm(numbers.float()) for numbers in self.numbers.values()], norm_max)


class GradientPool:
    """All gradient memory of a worker."""

    def __init__(self, layout: Layout, wire: WireLayout) -> None:
        self._layout = layout
        self._wire = wire
        self._free: list[GradientMemory] = []
        self._taken: list[GradientMemory] = []
        self._step = 0

    def take(self) -> GradientMemory:
        """Memory that no server reads."""
        memory = self._free.pop() if self._free else GradientMemory(self._layout, self._wire)
        self._taken.append(memory)
        return memory

    def take_for(self, step: int, *, shared: bool) -> GradientMemory:
        """Memory for the gradient of a rank in a step.

        Where servers read gradients in place (``shared``), each rank of a step needs its own, and the next version
        frees them. Where they are sent, one is enough, once it has left.
        """
        if not shared or step != self._step:
            self.release()
        self._step = step
        return self.take()

    def put_back(self, memory: GradientMemory, *, read: bool) -> None:
        """Take one back. ``read``: a server may still read it, so it is not used again."""
        self._taken.remove(memory)
        if not (read and memory.passed):
            self._free.append(memory)

    def release(self) -> None:
        """No server reads any of it any more."""
        self._free += self._taken
        self._taken.clear()

    def give_up(self) -> None:
        """The connections are gone, and servers may go on reading what was passed to them: never use that again."""
        self._free += [memory for memory in self._taken if not memory.passed]
        self._taken.clear()
