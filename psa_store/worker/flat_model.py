"""A model's tensors as views of one flat range of memory, laid out as the job's arena.

Parameters that a server sends are received straight into the model; parameters that a server of this host publishes
are mapped where the model has them, and need not be moved at all. A gradient is copied once, while it is in the cache,
from where autograd left it into the flat memory that is sent or that servers read. Models on an accelerator keep their
own memory; theirs is copied to and from the arena, which is on the host.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

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


def describe_model(model: nn.Module, group_of: Callable[[str, tuple[int, ...]], int]) -> list[TensorSpec]:
    """List the parameters and buffers of a model in its own order; tied ones once, with all their names."""
    in_state = set(model.state_dict(keep_vars=True))
    specs = []
    for role_of, named in (
        (_role_of_parameter, model.named_parameters(remove_duplicate=False)),
        (_role_of_buffer, model.named_buffers(remove_duplicate=False)),
    ):
        by_identity: dict[int, list[str]] = {}
        tensors: dict[int, Tensor] = {}
        for name, tensor in named:
            by_identity.setdefault(id(tensor), []).append(name)
            tensors[id(tensor)] = tensor
        for identity, names in by_identity.items():
            tensor = tensors[identity]
            role = role_of(tensor)
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


def _role_of_parameter(tensor: Tensor) -> TensorRole:
    return TensorRole.TRAINED if tensor.requires_grad else TensorRole.FROZEN


def _role_of_buffer(_tensor: Tensor) -> TensorRole:
    return TensorRole.BUFFER


@dataclass(slots=True)
class _BoundTensor:
    """One tensor of the model and its places in the flat memory."""

    index: int
    spec: TensorSpec
    holder: dict[str, Tensor | None]
    """Where the module keeps it: looked up each time, because tensors may be reassigned."""
    name: str
    view: Tensor
    shards: tuple[int, ...]
    ready: bool = False


class FlatModel:
    """Binds ``model`` to flat memory; calls ``on_ready(shards)``, during backward, when their gradients are whole."""

    def __init__(self, model: nn.Module, layout: Layout, on_ready: Callable[[list[int]], None]) -> None:
        self._model = model
        self._layout = layout
        self._on_ready = on_ready
        self._window = Window(layout.arena_bytes)
        self._memory = torch.frombuffer(self._window.buffer, dtype=torch.uint8)
        self._wire = WireLayout(layout)
        self._rounded: dict[int, Tensor] = {}
        """Shards that are rounded on their way: received here, or shown here by a server of this host."""
        self._gradients: GradientMemory | None = None
        self._log = logs.get_logger()
        self._buffers_low, self._buffers_high = _range(layout.shards_of(TensorRole.BUFFER))
        self._buffers_kept = torch.zeros(self._buffers_high - self._buffers_low, dtype=torch.uint8)
        self._bound = [self._bind_new(index) for index in range(len(layout.tensors))]
        self._open = False
        self._accumulating = False
        self._left: dict[int, int] = {}
        self._hooks = []
        for bound, tensor in self._each():
            bound.view.copy_(tensor.detach())
            self._bind(bound, tensor)
            if bound.spec.role is TensorRole.TRAINED:
                hook = tensor.register_post_accumulate_grad_hook(self._hook_for(bound))  # type: ignore[no-untyped-call]
                self._hooks.append(hook)

    def close(self) -> None:
        """Take the hooks off; the model keeps its values, in memory of its own."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._window.close()

    # --- memory of shards

    def parameters(self, shard: Shard) -> memoryview:
        """The bytes of a shard's parameters or buffers as the model has them."""
        return _bytes(self._memory, shard)

    def carry(self, wire: WireLayout) -> None:
        """Parameters will come in the places of ``wire``. Called once, before any comes."""
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
        self._buffers_kept.copy_(self._memory[self._buffers_low : self._buffers_high])
        for bound, tensor in self._each():
            self._bind(bound, tensor)

    def show_parameters(self) -> None:
        """The parameters in the arena have changed: bring them into tensors that are not views."""
        for bound, tensor in self._each():
            if bound.spec.role is TensorRole.TRAINED:
                self._bind(bound, tensor)

    def collect_buffers(self) -> None:
        """Bring buffers that the model moved elsewhere, or that live on an accelerator, into the arena."""
        for bound, tensor in self._each():
            if bound.spec.role is TensorRole.BUFFER and tensor.data_ptr() != bound.view.data_ptr():
                bound.view.copy_(tensor.detach())

    # --- gradients

    def begin(self, gradients: GradientMemory, *, keep_buffers: bool = False) -> None:
        """Get ready for the forward and backward pass of one rank: no gradients, and the buffers of the version.

        ``keep_buffers``: those that the pass before left, rather.
        """
        self._gradients = gradients
        if not keep_buffers:
            self._memory[self._buffers_low : self._buffers_high].copy_(self._buffers_kept)
        for bound, tensor in self._each():
            if bound.spec.role is TensorRole.BUFFER and not keep_buffers:
                self._bind(bound, tensor)
            elif bound.spec.role is TensorRole.TRAINED:
                tensor.grad = None
                bound.ready = False
        self._left = {}
        for bound in self._bound:
            for shard in bound.shards:
                self._left[shard] = self._left.get(shard, 0) + 1
        self._open = True

    def end(self) -> None:
        """Backward is over: parameters that got no gradient count as zero, so that every shard becomes ready."""
        complete: list[int] = []
        for bound, tensor in self._each():
            if bound.spec.role is TensorRole.TRAINED and not bound.ready:
                complete += self._take(bound, tensor)
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
                if bound.ready:
                    raise UsageError(
                        "backward() ran twice for one batch: wrap all but the last in `with worker.accumulate():`"
                    )
                complete = self._take(bound, tensor)
                if complete:
                    self._on_ready(complete)

        return hook

    def _take(self, bound: _BoundTensor, tensor: Tensor) -> list[int]:
        """Bring a tensor's gradient into the flat memory; returns the shards that are complete with it."""
        assert self._gradients is not None
        place = self._gradients.views[bound.index]
        assert place is not None
        if tensor.grad is None:
            place.zero_()
        elif tensor.grad.data_ptr() != place.data_ptr():
            place.copy_(tensor.grad.to_dense() if tensor.grad.is_sparse else tensor.grad)
            if tensor.device == place.device and tensor.dtype is place.dtype:
                tensor.grad = place
        bound.ready = True
        complete = []
        for shard in bound.shards:
            self._left[shard] -= 1
            if self._left[shard] == 0:
                complete.append(shard)
        return complete

    # --- binding

    def _each(self) -> Iterator[tuple[_BoundTensor, Tensor]]:
        """Every bound with the model's present tensor."""
        for bound in self._bound:
            tensor = bound.holder[bound.name]
            assert tensor is not None
            yield bound, tensor

    def _bind(self, bound: _BoundTensor, tensor: Tensor) -> None:
        if tensor.device == bound.view.device:
            if tensor.data_ptr() != bound.view.data_ptr():
                tensor.data = bound.view
        else:
            with torch.no_grad():
                tensor.copy_(bound.view)

    def _bind_new(self, index: int) -> _BoundTensor:
        spec = self._layout.tensors[index]
        low = self._layout.offsets_bytes[index]
        view = _shaped(self._memory, low, spec)
        trained = spec.role is TensorRole.TRAINED
        shards = tuple(
            shard.index
            for shard in self._layout.shards_of(TensorRole.TRAINED)
            if trained and shard.offset_bytes < low + spec.size_bytes and low < shard.offset_bytes + shard.size_bytes
        )
        path, _, name = spec.name.rpartition(".")
        owner = self._model.get_submodule(path)
        holder = (
            owner._buffers if spec.role is TensorRole.BUFFER else cast("dict[str, Tensor | None]", owner._parameters)
        )
        return _BoundTensor(index, spec, holder, name, view, shards)


def _shaped(memory: Tensor, low: int, spec: TensorSpec) -> Tensor:
    return memory[low : low + spec.size_bytes].view(to_torch(spec.dtype)).view(spec.shape)


def _bytes(memory: Tensor, shard: Shard) -> memoryview:
    return as_bytes(memory)[shard.offset_bytes : shard.offset_bytes + shard.size_bytes]


def _range(shards: tuple[Shard, ...]) -> tuple[int, int]:
    return (shards[0].offset_bytes, _end(shards)) if shards else (0, 0)


def _end(shards: tuple[Shard, ...]) -> int:
    return shards[-1].offset_bytes + shards[-1].size_bytes if shards else 0
