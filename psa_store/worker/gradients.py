"""The memory that gradients are written to and sent from: one for each rank that is computed in a step.

A server of this host reads a gradient where it lies, until the step is over. So memory of which a push has been
announced is not written again before the next version is here (or, on arrival, the push is durable), and is given up,
not used again, when the connections were lost meanwhile: a server may still hold what was pushed from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import Layout, TensorRole
from psa_store.job.parts import parts_of
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.note import PLAIN
from psa_store.optim.reduce import clip_factor, squared_norm
from psa_store.optim.tensors import as_bytes, to_torch
from psa_store.wire import CopyOnWrite, SharedMemory

NORM_SURELY_FINITE = 1e18
"""Above it, the float32 sum of squares may overflow although every element is finite."""
_ELEMENT_MAX = 1e33
"""A larger element counts as not finite: the sum over 65536 ranks must not overflow float32."""


class GradientMemory:
    """One rank's gradient, in the places of ``wire``; memory is mapped here for those ``stages`` only."""

    def __init__(self, layout: Layout, wire: WireLayout, stages: Iterable[int] | None = None) -> None:
        self.shared = SharedMemory.create("gradient", wire.gradient_bytes)
        self.passed = False
        """Whether a server has its descriptor."""
        self.note = PLAIN
        """What is said of this gradient beside its numbers."""
        self.stages: frozenset[int] = frozenset()
        self.views: dict[int, Tensor] = {}
        """By trained tensor of the layout. Each has a version counter of its own."""
        self.views_after_step: dict[int, Tensor] = {}
        """The same gradient, for the model once it is handed over: what a script writes there changes nothing here."""
        self.numbers: dict[int, Tensor] = {}
        """By trained shard: its gradient, flat."""
        self._layout = layout
        self._wire = wire
        self._after_step: list[CopyOnWrite] = []
        self._ranges: list[tuple[int, int]] = []
        """What is mapped."""
        trained = layout.shards_of(TensorRole.TRAINED)
        self.add({stage for shard in trained for stage in shard.stages} if stages is None else stages)

    def add(self, stages: Iterable[int]) -> None:
        """Have the gradients of more stages."""
        new = frozenset(stages) - self.stages
        self.stages |= new
        layout, wire = self._layout, self._wire
        shards = [
            shard
            for shard in layout.shards_of(TensorRole.TRAINED)
            if not new.isdisjoint(shard.stages) and shard.index not in self.numbers
        ]
        tensors = [
            index
            for index, spec in enumerate(layout.tensors)
            if spec.role is TensorRole.TRAINED and not new.isdisjoint(spec.stages) and index not in self.views
        ]
        if not tensors:
            return
        parts = parts_of((wire.offset_bytes(each), wire.offset_bytes(each) + wire.size_bytes(each)) for each in shards)
        mapped: list[tuple[int, int, Tensor, Tensor]] = []
        for low, high in parts.ranges:
            self._ranges.append((low, high))
            after_step = self.shared.copy_on_write(low, high)
            self._after_step.append(after_step)
            own = torch.frombuffer(self.shared.part(low, high), dtype=torch.uint8)
            mapped.append((low, high, own, torch.frombuffer(after_step.buffer, dtype=torch.uint8)))

        def cut(at: int, dtype: str, numel: int) -> tuple[Tensor, Tensor]:
            """Some numbers, and the same after the step."""
            at = at if numel else mapped[0][0]
            start, own, other = next((low, own, other) for low, high, own, other in mapped if low <= at < high)
            here = slice(at - start, at - start + numel * ITEM_BYTES[dtype])
            return own[here].view(to_torch(dtype)), other[here].view(to_torch(dtype))

        for index in tensors:
            spec = layout.tensors[index]
            own, other = cut(wire.tensor_offset_bytes(index), wire.tensor_dtype(index), spec.numel)
            self.views[index], self.views_after_step[index] = own.view(spec.shape).data, other.view(spec.shape).data
        for shard in shards:
            self.numbers[shard.index], _ = cut(wire.offset_bytes(shard), wire.dtype(shard), shard.numel)

    def clear(self) -> None:
        """Have memory for no stage any more; servers go on reading what was passed to them."""
        self.stages = frozenset()
        self.views, self.views_after_step, self.numbers = {}, {}, {}
        self._after_step, self._ranges = [], []

    def restrict(self, stages: Iterable[int]) -> None:
        """Have the gradients of these stages and no others, which nothing reads any more."""
        wanted = frozenset(stages)
        if wanted != self.stages:
            for low, high in self._ranges:
                self.shared.discard(low, high)
            self.clear()
            self.add(wanted)

    def begin(self) -> None:
        """Get ready for another gradient."""
        self.note = PLAIN
        for each in self._after_step:
            each.forget()

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

    def take(self, stages: Collection[int] | None = None) -> GradientMemory:
        """Memory that no server reads, for these stages; None: for all."""
        if self._free:
            memory = self._free.pop()
            if stages is not None:
                memory.restrict(stages)
        else:
            memory = GradientMemory(self._layout, self._wire, stages)
        self._taken.append(memory)
        return memory

    def take_for(self, step: int, stages: Collection[int] | None = None, *, shared: bool) -> GradientMemory:
        """Memory for the gradient of a rank in a step.

        Where servers read gradients in place (``shared``), each rank of a step needs its own, and the next version
        frees them. Where they are sent, one is enough, once it has left.
        """
        if not shared or step != self._step:
            self.release()
        self._step = step
        return self.take(stages)

    def put_back(self, memory: GradientMemory, *, read: bool) -> None:
        """Take one back. ``read``: a server may still read it, so it is not used again."""
        self._taken.remove(memory)
        if not (read and memory.passed):
            self._free.append(memory)

    def unused(self, memory: GradientMemory) -> None:
        """No gradient was made in one: it is free again, if it has not been given up meanwhile."""
        if memory in self._taken:
            self.put_back(memory, read=False)

    def release(self) -> None:
        """No server reads any of it any more."""
        self._free += self._taken
        self._taken.clear()

    def give_up(self) -> None:
        """The connections are gone, and servers may go on reading what was passed to them: never use that again."""
        self._free += [memory for memory in self._taken if not memory.passed]
        self._taken.clear()
