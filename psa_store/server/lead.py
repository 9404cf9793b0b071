"""The memory of one shard that a server leads, and the arithmetic on it.

All methods are safe in any thread as long as only one touches the same shard at a time; the engine sees to that.
Results do not depend on which thread runs them nor on how many there are: torch runs single-threaded here, and the
parallelism is over shards.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from psa_store.layout import ITEM_BYTES, Layout, Role, Shard
from psa_store.optim import Optimizer
from psa_store.optim.kernels import ShardKernel, init_slots, slot_dtype, slot_names
from psa_store.optim.reduce import squared_norm
from psa_store.storage import Manifest

BLOCK_ELEMENTS = 1 << 16
"""Gradients are summed in blocks that stay in the cache: 256 KiB of float32."""

PARAM = "param"
OPT_STEP = "opt_step"


def torch_dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, writable, without a copy."""
    return tensor.view(torch.uint8).numpy().data


class Lead:
    """One shard: parameters, optimizer slots, the gradients of the current step, and the snapshot being committed."""

    def __init__(self, shard: Shard, layout: Layout, optimizer: Optimizer) -> None:
        self.shard = shard
        self._layout = layout
        self._optimizer = optimizer
        self.opt_step = 0
        self.committed: Manifest | None = None
        self.param = torch.zeros(shard.numel, dtype=torch_dtype(shard.dtype))
        trained = shard.role is Role.TRAINED
        self.slots: dict[str, Tensor] = {}
        if trained:
            dtypes = slot_dtype(optimizer, shard.dtype)
            self.slots = {
                name: torch.zeros(shard.numel, dtype=torch_dtype(dtypes[name]))
                for name in slot_names(optimizer, shard.dtype)
            }
        self._kernel: ShardKernel | None = None
        self._gradients: dict[int, Tensor] = {}
        self._wide: Tensor | None = None
        self._snapshot: dict[str, Tensor] = {}
        self._snapshot_opt_step = 0

    # --- loading

    def places(self, manifest: Manifest) -> dict[str, memoryview]:
        """Where the sections of a manifest are to be read into."""
        own = {PARAM: self.param, **self.slots}
        return {section.name: as_bytes(own[section.name]) for section in manifest.sections}

    def loaded(self, manifest: Manifest) -> None:
        """The sections of ``manifest`` are in place: get ready to serve.

        Version 0 comes from a worker and holds parameters only; the optimizer's state starts from them.
        """
        if self.shard.role is Role.TRAINED:
            if not any(section.name in self.slots for section in manifest.sections):
                self.slots = init_slots(self._optimizer, self.param, self.shard, self._layout)
            self._kernel = ShardKernel(self._optimizer, self._layout, self.shard, self.param, self.slots)
        self.opt_step = int(manifest.scalars.get(OPT_STEP, 0))
        self.committed = manifest

    # --- one step

    def gradient(self, rank: int) -> Tensor:
        """The place for the gradient (or, for buffers, the value) that a rank pushes."""
        if rank not in self._gradients:
            self._gradients[rank] = torch.empty_like(self.param)
        return self._gradients[rank]

    def reduce(self, ranks: int) -> float:
        """Average the gradients in the order of ranks, so that bits do not depend on arrival; returns |mean|²."""
        total = self._sum_place()
        parts = [self._gradients[rank] for rank in range(ranks)]
        for low in range(0, len(total), BLOCK_ELEMENTS):
            block = total[low : low + BLOCK_ELEMENTS]
            if total is not parts[0]:
                block.copy_(parts[0][low : low + BLOCK_ELEMENTS])
            for part in parts[1:]:
                block.add_(part[low : low + BLOCK_ELEMENTS])
            if ranks > 1:
                block.mul_(1.0 / ranks)
        return squared_norm(total)

    def apply(self, *, step: int, grad_scale: float) -> None:
        """Update parameters and state in place with the reduced gradient, or take over rank 0's buffers."""
        if self._kernel is None:
            self.param.copy_(self._gradients[0])
            return
        self._kernel.apply(self._sum_place(), step=step, opt_step=self.opt_step, grad_scale=grad_scale)
        self.opt_step += 1

    def nonfinite(self, ranks: int) -> dict[int, str]:
        """After a refusal: which ranks pushed NaN or Inf, and in which parameter first.

        The sum was built in rank 0's place, so rank 0 is blamed where the sum is not finite and all others are.
        """
        blamed: dict[int, str] = {}
        others = torch.ones(self.shard.numel, dtype=torch.bool)
        for rank in range(1, ranks):
            finite = torch.isfinite(self._gradients[rank])
            others &= finite
            if not bool(finite.all()):
                blamed[rank] = self._layout.tensor_at(self.shard, int((~finite).nonzero()[0]))
        first = self._gradients[0] if self._wide is not None else self._sum_place()
        bad = ~torch.isfinite(first) & others
        if bool(bad.any()):
            blamed[0] = self._layout.tensor_at(self.shard, int(bad.nonzero()[0]))
        return blamed

    def _sum_place(self) -> Tensor:
        """Rank 0's own gradient is the accumulator, unless it is too narrow to add in."""
        if ITEM_BYTES[self.shard.dtype] >= 4:
            return self._gradients[0]
        if self._wide is None:
            self._wide = torch.empty(self.shard.numel, dtype=torch.float32)
        return self._wide

    # --- committing

    def take_snapshot(self) -> None:
        """Copy the state, so that it can be written while the next step changes it."""
        for name, tensor in {PARAM: self.param, **self.slots}.items():
            if name not in self._snapshot:
                self._snapshot[name] = torch.empty_like(tensor)
            self._snapshot[name].copy_(tensor)
        self._snapshot_opt_step = self.opt_step

    def snapshot(self) -> tuple[Mapping[str, tuple[str, memoryview]], dict[str, float | int]]:
        """Sections and scalars of the snapshot, as storage takes them."""
        arrays = {
            name: (str(tensor.dtype).removeprefix("torch."), as_bytes(tensor))
            for name, tensor in self._snapshot.items()
        }
        return arrays, {OPT_STEP: self._snapshot_opt_step}
