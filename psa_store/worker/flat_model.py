"""A model's tensors as views of one flat range of memory, laid out as the job's layout says.

Parameters that a server sends are received straight into the model; parameters that a server of this host publishes
are mapped where the model has them, and need not be moved at all. A gradient is copied once, while it is in the cache,
from where autograd left it into the flat memory that is sent or that servers read. Models on an accelerator keep their
own memory; theirs is copied to and from the flat memory, which is on the host.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from psa_store import logs
from psa_store.errors import UsageError
from psa_store.job.layout import Layout, Shard, TensorRole, TensorSpec
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.tensors import as_bytes, name_of, to_torch
from psa_store.wire import SharedMemory, Window
from psa_store.worker.gradients import GradientMemory

OnReady = Callable[[list[int]], None]
"""Is called with shards whose gradients are whole, in the middle of backward."""


def describe_model(model: nn.Module, group_of: Callable[[str, tuple[int, ...]], int]) -> list[TensorSpec]:
    """List the parameters and buffers of a model in its own order; tied ones once, with all their names."""
    in_state = set(model.state_dict(keep_vars=True))
    specs = []
    for named, are_parameters in (
        (model.named_parameters(remove_duplicate=False), True),
        (model.named_buffers(remove_duplicate=False), False),
    ):
        by_identity: dict[int, tuple[Tensor, list[str]]] = {}
        for name, tensor in named:
            by_identity.setdefault(id(tensor), (tensor, []))[1].append(name)
        for tensor, names in by_identity.values():
            role = TensorRole.BUFFER
            if are_parameters:
                role = TensorRole.TRAINED if tensor.requires_grad else TensorRole.FROZEN
            shape = tuple(tensor.shape)
            specs.append(
                TensorSpec(
                    names=tuple(names),
                    shape=shape,
                    dtype=name_of(tensor.dtype),
                    role=role,
                    group=group_of(names[0], shape) if role is TensorRole.TRAINED else 0,
                    persistent=names[0] in in_state,
                )
            )
    return specs


@dataclass(slots=True, eq=False)
class _BoundTensor:
    """One tensor of the model and its places in the flat memory."""

    index: int
    role: TensorRole
    holder: dict[str, Tensor | None]
    """Where the module keeps it: looked up each time, because tensors may be reassigned."""
    name: str
    view: Tensor
    address: int
    """Of ``view``."""
    shards: tuple[int, ...]
    """The trained shards that it has a part of."""

    @property
    def tensor(self) -> Tensor:
        """The model's present one."""
        tensor = self.holder[self.name]
        assert tensor is not None
        return tensor


class FlatModel:
    """Binds ``model`` to flat memory."""

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        self._window = Window(layout.arena_bytes)
        self._memory = torch.frombuffer(self._window.buffer, dtype=torch.uint8)
        self._wire = WireLayout(layout)
        self._rounded: dict[int, Tensor] = {}
        """Shards that are rounded on their way: received here, or shown here by a server of this host."""
        self._log = logs.get_logger()
        buffers = layout.shards_of(TensorRole.BUFFER)
        self._buffers = self._memory[
            slice(buffers[0].offset_bytes, buffers[-1].offset_bytes + buffers[-1].size_bytes) if buffers else slice(0)
        ]
        self._buffers_kept = self._buffers.clone()
        self._bound = [self._bind_new(index) for index in range(len(layout.tensors))]
        self._bound_buffers = [bound for bound in self._bound if bound.role is TensorRole.BUFFER]
        self._bound_trained = [bound for bound in self._bound if bound.role is TensorRole.TRAINED]
        self._places_of = Counter(shard for bound in self._bound for shard in bound.shards)
        """By trained shard, how many tensors have a part of it."""
        self._gradients: GradientMemory
        self._on_ready: OnReady
        self._open = False
        self._accumulating = False
        self._missing: set[_BoundTensor] = set()
        """Trained tensors whose gradient is not there yet, and by shard, how many of its tensors that are:"""
        self._left: dict[int, int] = {}
        for bound in self._bound:
            bound.view.copy_(bound.tensor.detach())
            self._bind(bound)
        self._hooks = [
            bound.tensor.register_post_accumulate_grad_hook(self._hook_for(bound))  # type: ignore[no-untyped-call]
            for bound in self._bound_trained
        ]

    def close(self) -> None:
        """Take the hooks off; the model keeps its values, in memory of its own."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._window.close()

    # --- memory of shards

    def parameters(self, shard: Shard) -> memoryview:
        """The bytes of a shard's parameters or buffers as the model has them."""
        return as_bytes(self._memory)[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]

    def receive_as(self, wire: WireLayout) -> None:
        """Parameters come as ``wire`` lays them out. Called once, before any comes."""
        self._wire = wire

    def place(self, shard: Shard) -> memoryview:
        """Where a shard that comes by value is to be received."""
        if self._wire.dtype(shard) == shard.dtype:
            return self.parameters(shard)
        if shard.index not in self._rounded:
            self._rounded[shard.index] = torch.empty(shard.numel, dtype=to_torch(self._wire.dtype(shard)))
        return as_bytes(self._rounded[shard.index])

    def show(self, server: str, descriptor: int, shards: Sequence[int]) -> None:
        """Let the model have these trained shards where a server of this host publishes them.

        Raises:
            Refused: the descriptor's memory is not what the layout needs.
        """
        if not self._wire.is_exact:
            memory = SharedMemory.attach(descriptor, self._wire.gradient_bytes)
            for shard in (self._layout.shards[index] for index in shards):
                self._rounded[shard.index] = torch.frombuffer(
                    memory.buffer,
                    dtype=to_torch(self._wire.dtype(shard)),
                    offset=self._wire.offset_bytes(shard),
                    count=shard.numel,
                )
            return
        ranges: list[tuple[int, int]] = []
        for index in shards:
            shard = self._layout.shards[index]
            low, high = shard.offset_bytes, shard.offset_bytes + shard.size_bytes
            if ranges and ranges[-1][1] == low:
                ranges[-1] = ranges[-1][0], high
            else:
                ranges.append((low, high))
        self._window.show(server, descriptor, ranges)

    def hide(self) -> None:
        """Own memory for everything again, with undefined contents: parameters are about to be received."""
        self._window.hide()
        self._rounded.clear()

    # --- versions

    def version_arrived(self) -> None:
        """All shards are here: bring them into tensors that are not views, and keep the buffers."""
        if self._window.shows and self._window.refresh():
            self._log.debug("the script wrote to parameters: undone, as with every new version")
        for index, rounded in self._rounded.items():
            shard = self._layout.shards[index]
            whole = self._memory[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]
            whole.view(to_torch(shard.dtype)).copy_(rounded)
        if self._bound_buffers:
            self._buffers_kept.copy_(self._buffers)
        for bound in self._bound:
            if bound.holder[bound.name].data_ptr() != bound.address:  # type: ignore[union-attr]
                self._bind(bound)

    def show_parameters(self) -> None:
        """The parameters in the flat memory have changed: bring them into tensors that are not views."""
        for bound in self._bound_trained:
            self._bind(bound)

    def collect_buffers(self) -> None:
        """Bring buffers that the model moved elsewhere, or that live on an accelerator, into the flat memory."""
        for bound in self._bound_buffers:
            if bound.tensor.data_ptr() != bound.address:
                bound.view.copy_(bound.tensor.detach())

    # --- gradients

    def begin(self, gradients: GradientMemory, on_ready: OnReady, *, keep_buffers: bool = False) -> None:
        """Get ready for the forward and backward pass of one rank: no gradients, and the buffers of the version.

        ``on_ready``: called with shards when their gradients are whole. ``keep_buffers``: go on with the buffers that
        the pass before left.
        """
        self._gradients = gradients
        self._on_ready = on_ready
        if self._bound_buffers and not keep_buffers:
            self._buffers.copy_(self._buffers_kept)
            for bound in self._bound_buffers:
                self._bind(bound)
        for bound in self._bound_trained:
            bound.holder[bound.name].grad = None  # type: ignore[union-attr]
        self._missing = set(self._bound_trained)
        self._left = dict(self._places_of)
        self._open = True

    def end(self) -> None:
        """Backward is over: parameters that got no gradient count as zero, so that every shard becomes ready."""
        complete: list[int] = []
        for bound in tuple(self._missing):
            complete += self._take(bound, bound.tensor)
        self._open = False
        if complete:
            self._on_ready(sorted(complete))

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside only add to ``.grad``; the first one outside makes shards ready."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    def _hook_for(self, bound: _BoundTensor) -> Callable[[Tensor], None]:
        def hook(tensor: Tensor) -> None:
            if self._open and not self._accumulating:
                if bound not in self._missing:
                    raise UsageError(
                        "backward() ran twice for one batch: wrap all but the last in `with worker.accumulate():`"
                    )
                complete = self._take(bound, tensor)
                if complete:
                    self._on_ready(complete)

        return hook

    def _take(self, bound: _BoundTensor, tensor: Tensor) -> list[int]:
        """Bring a tensor's gradient into the flat memory; returns the shards that are complete with it."""
        place, gradient = self._gradients.views[bound.index], tensor.grad
        assert place is not None
        if gradient is None:
            place.zero_()
        elif gradient.is_sparse or gradient.data_ptr() != place.data_ptr():
            place.copy_(gradient.to_dense() if gradient.is_sparse else gradient)
            if tensor.device == place.device and tensor.dtype is place.dtype:
                tensor.grad = place
        self._missing.discard(bound)
        complete = []
        for shard in bound.shards:
            self._left[shard] -= 1
            if self._left[shard] == 0:
                complete.append(shard)
        return complete

    # --- binding

    def _bind(self, bound: _BoundTensor) -> None:
        """Let the model's tensor be the view, or have its values."""
        tensor = bound.tensor
        if tensor.device == bound.view.device:
            if tensor.data_ptr() != bound.address:
                tensor.data = bound.view
        else:
            with torch.no_grad():
                tensor.copy_(bound.view)

    def _bind_new(self, index: int) -> _BoundTensor:
        spec, low = self._layout.tensors[index], self._layout.offsets_bytes[index]
        high = low + spec.size_bytes
        view = self._memory[low:high].view(to_torch(spec.dtype)).view(spec.shape)
        trained = self._layout.shards_of(TensorRole.TRAINED) if spec.role is TensorRole.TRAINED else ()
        shards = tuple(s.index for s in trained if s.offset_bytes < high and low < s.offset_bytes + s.size_bytes)
        path, _, name = spec.name.rpartition(".")
        owner = self._model.get_submodule(path)
        holder = (
            owner._buffers if spec.role is TensorRole.BUFFER else cast("dict[str, Tensor | None]", owner._parameters)
        )
        return _BoundTensor(index, spec.role, holder, name, view, view.data_ptr(), shards)
