"""The memory of one shard that a server owns, and the arithmetic on it.

All methods are safe in any thread as long as only one touches the same shard at a time; the event loop sees to that.
Results do not depend on which thread runs them nor on how many there are: torch runs single-threaded here, and the
parallelism is over shards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store.compression import NONE, Compression
from psa_store.compression.codec import decode, encode
from psa_store.job.average import Average
from psa_store.job.layout import Layout, Shard, TensorRole
from psa_store.job.sampling import rounding_stream
from psa_store.job.wire_layout import WireLayout
from psa_store.optim import Optimizer
from psa_store.optim.history import OptimizerHistory
from psa_store.optim.kernels import ShardKernel, init_slots
from psa_store.optim.note import PLAIN, GradientNote, left_out
from psa_store.optim.slots import slot_dtype, slot_names
from psa_store.optim.tensors import as_bytes, name_of, to_torch
from psa_store.storage import Manifest
from psa_store.storage.sections import CLOCK, OPT_STEP, PARAM, PUBLISHED, RANK, SKIPPED
from psa_store.wire import SharedMemory

_NO_RANK = 65536
"""Whose random numbers round what servers publish: no job has so many ranks."""


def tensor_in(memory: SharedMemory, shard: Shard, wire: WireLayout) -> Tensor:
    """A shard's place in memory that is shared."""
    return torch.frombuffer(
        memory.buffer, dtype=to_torch(wire.dtype(shard)), offset=wire.offset_bytes(shard), count=shard.numel
    )


class OwnedShard:
    """One shard: parameters, optimizer slots, the gradients of the current step, and the snapshot being committed.

    ``memory``: where parameters are published, in the places of ``wire``. ``clocks``: of how many ranks the pushes are
    counted; 0 in a synchronous job. ``movements``: with which compression what is published moves from version to
    version; then it follows the parameters as closely as that allows (what one movement leaves out is in the next), and
    ``seed`` is the root of what is rounded at random. ``average``: of the parameters, kept among the slots.
    """

    def __init__(
        self,
        shard: Shard,
        layout: Layout,
        wire: WireLayout,
        optimizer: Optimizer,
        memory: SharedMemory,
        clocks: int = 0,
        movements: Compression = NONE,
        seed: int = 0,
        average: Average | None = None,
    ) -> None:
        self.shard = shard
        self._average = average
        self._movements = movements
        self._seed = seed
        trained = shard.role is TensorRole.TRAINED
        self.movement: Tensor | None = None
        """What the newest version added to what is published, encoded; None if it is published as it is."""
        if trained and movements.applies_to(shard.dtype):
            self.movement = torch.zeros(movements.payload_bytes(shard.numel), dtype=torch.uint8)
        self._layout = layout
        self._wire = wire
        self._optimizer = optimizer
        self.history = OptimizerHistory(optimizer)
        """The optimizer of each step."""
        self.opt_step = 0
        self.clocks = [0] * clocks
        """By rank, how many of its pushes are in this shard, where each is an update of its own."""
        self.copied_clocks = self.clocks.copy()
        self.committed: Manifest | None = None
        self.published = tensor_in(memory, shard, wire)
        """What workers see: the parameters themselves, or a rounding of them."""
        exact = wire.dtype(shard) == shard.dtype and self.movement is None
        self.param = self.published if exact else torch.zeros(shard.numel, dtype=to_torch(shard.dtype))
        self.slots: dict[str, Tensor] = {}
        if trained:
            dtypes = slot_dtype(optimizer, shard.dtype, average)
            self.slots = {
                name: torch.zeros(shard.numel, dtype=to_torch(dtypes[name]))
                for name in slot_names(optimizer, shard.dtype, average)
            }
        self._kernel: ShardKernel | None = None
        self._own_places: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._notes: dict[int, GradientNote] = {}
        """By rank, what is said of its gradient, where that is out of the ordinary."""
        self._skipped: dict[int, int] = {}
        """By tensor, from how many updates it was left out; without those that were in all."""
        self._measured = False
        """Whether these gradients are the ones that the kernel measured last."""
        self.rank_states: dict[int, Tensor] = {}
        """By rank, its state at the present version, as bytes; empty if that was not pushed with it."""
        self._coming_states: dict[int, Tensor] = {}
        """The same for the version that is being collected."""
        self._snapshot: dict[str, Tensor] = {}
        self._snapshot_opt_step = 0
        self._snapshot_skipped: dict[int, int] = {}

    # --- loading

    def places(self, manifest: Manifest) -> dict[str, memoryview]:
        """Where the sections of a manifest are to be read into."""
        self.rank_states = {
            int(section.name.removeprefix(RANK)): torch.empty(section.size_bytes, dtype=torch.uint8)
            for section in manifest.sections
            if section.name.startswith(RANK)
        }
        own = self._sections()
        return {section.name: as_bytes(own[section.name]) for section in manifest.sections}

    def loaded(self, manifest: Manifest) -> None:
        """The sections of ``manifest`` are in place: get ready to serve.

        Version 0 comes from a worker and holds parameters only; the optimizer's state starts from them.
        """
        slots_are_new = not any(section.name in self.slots for section in manifest.sections)
        if self.shard.role is TensorRole.TRAINED and slots_are_new:
            self.slots = init_slots(self._optimizer, self.param, self.shard, self._layout, self._average)
        if self.published is not self.param and not any(section.name == PUBLISHED for section in manifest.sections):
            self.published.copy_(self.param)
        self._make_kernel()
        self.opt_step = int(manifest.scalars.get(OPT_STEP, 0))
        self._skipped = {
            int(name.removeprefix(SKIPPED)): int(count)
            for name, count in manifest.scalars.items()
            if name.startswith(SKIPPED)
        }
        self.clocks = [int(manifest.scalars.get(f"{CLOCK}{rank}", 0)) for rank in range(len(self.clocks))]
        self.committed = manifest

    def move_to(self, memory: SharedMemory) -> None:
        """Publish parameters in other memory from now on; the old one keeps the present version."""
        place = tensor_in(memory, self.shard, self._wire)
        place.copy_(self.published)
        if self.param is self.published:
            self.param = place
        self.published = place
        self._make_kernel()

    def _make_kernel(self) -> None:
        if self.shard.role is TensorRole.TRAINED:
            rounded = None if self.published is self.param or self.movement is not None else self.published
            self._kernel = ShardKernel(
                self._optimizer, self._layout, self.shard, self.param, self.slots, rounded, self._average
            )
            self._measured = False

    # --- one step

    def own_place(self, rank: int) -> Tensor:
        """Own memory for the gradient (or, for buffers, the value) of a rank that sends it by value."""
        if rank not in self._own_places:
            self._own_places[rank] = torch.empty_like(self.published)
        return self._own_places[rank]

    def take_gradient(self, rank: int, gradient: Tensor, note: GradientNote = PLAIN) -> None:
        """The gradient of a rank has arrived, and lies there until the step is over."""
        self._gradients[rank] = gradient
        if note is not PLAIN:
            self._notes[rank] = note
        self._measured = False

    def take_state(self, rank: int, state: Tensor) -> None:
        """The state of a rank at the version that is being collected has arrived."""
        self._coming_states[rank] = state

    def turn_states(self) -> None:
        """That version is made now."""
        self.rank_states, self._coming_states = self._coming_states, {}

    def fingerprints(self) -> dict[int, int]:
        """By rank, a digest of the gradient that counts for the current step."""
        index = self.shard.index
        return {rank: xxh3_64_intdigest(as_bytes(part), seed=index) for rank, part in self._gradients.items()}

    def squared_norm(self, scratch: Tensor) -> float:
        """|mean gradient|², before it is clipped."""
        assert self._kernel is not None
        parts, weights = self._parts(sorted(self._gradients))
        if not parts:
            return 0.0
        self._measured = True
        return self._kernel.squared_norm(parts, scratch, weights)

    def apply_one(self, rank: int, scratch: Tensor, *, step: int, finite: bool) -> None:
        """Update parameters and state in place with the push of one rank; one that is not finite only counts."""
        if finite and self._kernel is None:
            self.param.copy_(self._gradients[rank])
        elif finite:
            self._update([rank], scratch, step=step, grad_scale=1.0)
        del self._gradients[rank]
        self._notes.pop(rank, None)
        self.clocks[rank] += 1

    def apply(self, scratch: Tensor, *, step: int, grad_scale: float) -> None:
        """Update parameters and state in place with the mean of the gradients, or take over one rank's buffers."""
        if self._kernel is None:
            (values,) = self._gradients.values()
            self.param.copy_(values)
        else:
            self._update(sorted(self._gradients), scratch, step=step, grad_scale=grad_scale)
            if self.movement is not None:
                self._publish(self.movement, step)
        self._gradients.clear()
        self._notes.clear()

    def _publish(self, movement: Tensor, step: int) -> None:
        """Let what workers see follow the parameters, by an amount that has few bytes."""
        moved = self.param - self.published
        stream = rounding_stream(self._seed, step, _NO_RANK, self.shard.index)
        residual = torch.zeros_like(moved) if self._movements.needs_residual else None
        encode(self._movements, moved, movement, stream=stream, residual=residual)
        decode(self._movements, movement, moved)
        self.published.add_(moved)

    def drop_pushes(self) -> None:
        """What was pushed for the present step does not count: it is over without an update, or its term is."""
        self._gradients.clear()
        self._notes.clear()
        self._measured = False
        self._coming_states.clear()

    def _parts(self, ranks: Sequence[int]) -> tuple[list[Tensor], list[float] | None]:
        """The gradients of these ranks that count, and their weights; None: they count alike."""
        if not self._notes:
            return [self._gradients[rank] for rank in ranks], None
        weights = {rank: self._notes.get(rank, PLAIN).weight for rank in ranks}
        parts = [self._gradients[rank] for rank in ranks if weights[rank] > 0.0]
        counting = [weight for weight in weights.values() if weight > 0.0]
        return parts, counting if any(weight != 1.0 for weight in counting) else None

    def _update(self, ranks: Sequence[int], scratch: Tensor, *, step: int, grad_scale: float) -> None:
        """Update with the mean of the gradients of these ranks, all tensors that one of them gave a gradient."""
        optimizer = self.history.at(step)
        if optimizer is not self._optimizer:
            self._optimizer = optimizer
            self._make_kernel()
        assert self._kernel is not None
        absent: frozenset[int] = frozenset()
        if self._notes:
            tensors = {piece.tensor for piece in self.shard.pieces}
            absent = left_out([self._notes.get(rank, PLAIN) for rank in ranks], tensors)
        parts, weights = self._parts(ranks)
        if not parts:
            return  # each rank has left itself out: there is no update
        self._kernel.apply(
            parts,
            scratch,
            step=step,
            opt_step=self.opt_step,
            grad_scale=grad_scale,
            measured=self._measured,
            weights=weights,
            absent=absent,
            skipped=self._skipped,
        )
        for tensor in absent:
            self._skipped[tensor] = self._skipped.get(tensor, 0) + 1
        self._measured = False
        self.opt_step += 1

    # --- committing

    def take_snapshot(self) -> None:
        """Copy the state, so that it can be written while the next step changes it."""
        sections = self._sections()
        for gone in self._snapshot.keys() - sections.keys():
            del self._snapshot[gone]
        for name, tensor in sections.items():
            if name not in self._snapshot:
                self._snapshot[name] = torch.empty_like(tensor)
            self._snapshot[name].copy_(tensor)
        self._snapshot_opt_step, self._snapshot_skipped = self.opt_step, self._skipped.copy()
        self.copied_clocks = self.clocks.copy()

    def snapshot(self) -> tuple[Mapping[str, tuple[str, memoryview]], dict[str, float | int]]:
        """Sections and scalars of the snapshot, as storage takes them."""
        arrays = {name: (name_of(tensor.dtype), as_bytes(tensor)) for name, tensor in self._snapshot.items()}
        clocks = {f"{CLOCK}{rank}": clock for rank, clock in enumerate(self.copied_clocks)}
        skipped = {f"{SKIPPED}{tensor}": count for tensor, count in sorted(self._snapshot_skipped.items())}
        return arrays, {OPT_STEP: self._snapshot_opt_step, **clocks, **skipped}

    def _sections(self) -> dict[str, Tensor]:
        """All that is committed, by name."""
        states = {f"{RANK}{rank}": state for rank, state in sorted(self.rank_states.items())}
        published = {} if self.movement is None else {PUBLISHED: self.published}
        return {PARAM: self.param, **published, **self.slots, **states}
