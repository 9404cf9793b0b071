"""A model's tensors as views of one flat range of memory, laid out as the job's layout says.

Parameters that a server sends are received straight into the model; parameters that a server of this host publishes
are mapped where the model has them, and need not be moved at all. A gradient is copied once, while it is in the cache,
from where autograd left it into the flat memory that is sent or that servers read. Models on an accelerator keep their
own memory; theirs is copied to and from the flat memory, which is on the host.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from psa_store.errors import UsageError
from psa_store.job.layout import Layout, Shard, TensorRole, TensorSpec
from psa_store.job.parts import parts_of
from psa_store.job.wire_layout import WireLayout
from psa_store.optim.tensors import as_bytes, name_of, to_torch
from psa_store.wire import SharedMemory, Window
from psa_store.worker.aliases import refuse_aliases
from psa_store.worker.backward import Backward, BoundTensor, OnReady
from psa_store.worker.gradients import GradientMemory
from psa_store.worker.model_guard import ModelGuard, holder_of
from psa_store.worker.script import script_line


def describe_model(model: nn.Module, group_of: Callable[[str, tuple[int, ...]], int]) -> list[TensorSpec]:
    """List the parameters and buffers of a model in its own order; tied ones once, with all their names.

    Raises:
        UsageError: a parameter shares memory with another tensor, or has no shape yet.
    """
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if is_lazy(tensor):
            raise UsageError(f"{name} has no shape yet: call the model once with a batch before psa.Worker is made")
    refuse_aliases(model)
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


class FlatModel:
    """Binds ``model`` to flat memory. ``stage``: which part of the layout it is; the rest is not touched."""

    def __init__(self, model: nn.Module, layout: Layout, push_early: bool | None = None, stage: int = 0) -> None:
        self._model = model
        self._layout = layout
        self._stage = stage
        _refuse_another(model, layout, stage)
        own = [shard for shard in layout.shards if stage in shard.stages]
        self._parts = parts_of((shard.offset_bytes, shard.offset_bytes + shard.size_bytes) for shard in own)
        self._window = Window(self._parts)
        self._memory = torch.frombuffer(self._window.buffer, dtype=torch.uint8)
        self._wire = WireLayout(layout)
        self._rounded: dict[int, Tensor] = {}
        """Shards that are rounded on their way: received here, or shown here by a server of this host."""
        buffers = [self._slice(shard) for shard in own if shard.role is TensorRole.BUFFER]
        self._buffers = self._memory[slice(buffers[0].start, buffers[-1].stop) if buffers else slice(0)]
        self._buffers_kept = self._buffers.clone()
        self._bound = [self._bind_new(index) for index, spec in enumerate(layout.tensors) if stage in spec.stages]
        self._bound_buffers = [bound for bound in self._bound if bound.role is TensorRole.BUFFER]
        trained = self._bound_all_trained = [bound for bound in self._bound if bound.role is TensorRole.TRAINED]
        self._bound_trained = [bound for bound in trained if layout.tensors[bound.index].home == stage]
        self.tied = {bound.index: bound.tensor for bound in trained if layout.tensors[bound.index].home != stage}
        """By index in the layout, trained parameters that another stage has as well, whose cells push the gradient."""
        self._holders = [holder_of(model, bound.name) for bound in self._bound_buffers]
        """Where modules keep their buffers: a script may put another tensor there."""
        for bound in self._bound:
            bound.view.copy_(bound.tensor.detach())
            self._bind(bound)
        self.backward = Backward(self._bound_trained, push_early)
        self._guard = ModelGuard(model, self._bound)

    def close(self) -> None:
        """Take the hooks off; the model keeps its values, in memory of its own."""
        self.backward.close()
        self._window.close()

    @property
    def trained(self) -> list[int]:
        """The trained parameters that it has, by index in the layout, those included that belong to another stage."""
        return [bound.index for bound in self._bound_all_trained]

    def tensor(self, index: int) -> Tensor:
        """The model's tensor that has this index in the layout."""
        return next(bound.tensor for bound in self._bound if bound.index == index)

    # --- memory of shards

    def initial(self) -> Iterator[tuple[Shard, memoryview]]:
        """Each shard and its bytes, as the job begins with them."""
        yield from ((shard, self.parameters(shard)) for shard in self._layout.shards if shard.home == self._stage)

    def parameters(self, shard: Shard) -> memoryview:
        """The bytes of a shard's parameters or buffers as the model has them."""
        return as_bytes(self._memory)[self._slice(shard)]

    def buffers_as_of_now(self, shard: Shard) -> bytes:
        """A copy of a shard of buffers, which is on its way while the next pass writes to them."""
        return bytes(self.parameters(shard))

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
            self._show_rounded(descriptor, [self._layout.shards[index] for index in shards])
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

    def _show_rounded(self, descriptor: int, shards: Sequence[Shard]) -> None:
        wire = self._wire
        parts = parts_of((wire.offset_bytes(each), wire.offset_bytes(each) + wire.size_bytes(each)) for each in shards)
        try:
            for low, high in parts.ranges:
                memory = SharedMemory.attach(os.dup(descriptor), min(high, wire.gradient_bytes), low)
                for shard in shards:
                    if low <= wire.offset_bytes(shard) < high:
                        self._rounded[shard.index] = torch.frombuffer(
                            memory.buffer,
                            dtype=to_torch(wire.dtype(shard)),
                            offset=wire.offset_bytes(shard) - low,
                            count=shard.numel,
                        )
        finally:
            os.close(descriptor)

    def hide(self) -> None:
        """Own memory for everything again, with undefined contents: parameters are about to be received."""
        self._window.hide()
        self._rounded.clear()

    # --- versions

    def version_arrived(self) -> None:
        """All shards are here: bring them into tensors that are not views, and keep the buffers.

        Raises:
            UsageError: the script has written to the model since the last step, which would be undone now.
        """
        try:
            self._guard.check_parameters()
        except UsageError as error:
            raise UsageError(f"{script_line()}: {error}") from error
        self._guard.check_buffers_kept()
        for index, rounded in self._rounded.items():
            shard = self._layout.shards[index]
            self._memory[self._slice(shard)].view(to_torch(shard.dtype)).copy_(rounded)
        if self._bound_buffers:
            self._look_for_buffers()
            self._buffers_kept.copy_(self._buffers)
        for bound in self._bound:
            if bound.tensor.data_ptr() != bound.address:
                self._bind(bound)
        self._guard.renew()
        self._guard.renew_buffers()

    def show_parameters(self) -> None:
        """The parameters in the flat memory have changed: bring them into tensors that are not views."""
        for bound in self._bound_trained:
            self._bind(bound)
        self._guard.renew()

    def collect_buffers(self) -> None:
        """Bring buffers that the model moved elsewhere, or that live on an accelerator, into the flat memory."""
        self._look_for_buffers()
        for bound in self._bound_buffers:
            if bound.tensor.data_ptr() != bound.address:
                bound.view.copy_(bound.tensor.detach())

    def begin(self, gradients: GradientMemory, on_ready: OnReady | None, *, keep_buffers: bool = False) -> None:
        """Get ready for the forward and backward pass of one rank: no gradients, and the buffers of the version.

        ``on_ready``: as in :meth:`Backward.begin`. ``keep_buffers``: go on with the buffers that the pass before left.

        Raises:
            UsageError: the script has written to a buffer since the last step.
        """
        if self._bound_buffers and not keep_buffers:
            self._guard.check_buffers_kept()
            self._look_for_buffers()
            self._buffers.copy_(self._buffers_kept)
            for bound in self._bound_buffers:
                self._bind(bound)
        self._guard.release_buffers()
        self.backward.begin(gradients, on_ready)

    def end(self, weight: float) -> None:
        """The gradients are what they are now; see :meth:`Backward.end`.

        Raises:
            UsageError: the model is not the one any more that the job trains, or a gradient was changed too late.
        """
        self._guard.check()
        if self._window.shows and self._window.refresh():
            self._guard.refuse_write("of this model")
        self.backward.end(weight)
        self._guard.renew_buffers()

    @contextmanager
    def evaluate(self, values: Mapping[int, Tensor]) -> Iterator[None]:
        """Let the model have these values of its trained parameters inside, and then the present ones again.

        ``values``: by index in the layout. The flat memory, in which parameters may come meanwhile, is left alone.

        Raises:
            UsageError: the script has written to one inside, or called ``backward()``.
        """
        before = [(bound, bound.tensor.data, bound.tensor._version) for bound in self._bound_all_trained]
        self.backward.forward_only = True
        try:
            with torch.inference_mode(False):  # a parameter must not become a tensor of that mode
                for bound, _, _ in before:
                    bound.tensor.data = values[bound.index].to(bound.tensor)
            yield
            for bound, _, version in before:
                if bound.tensor._version != version:
                    self._guard.refuse_write(bound.name)
        finally:
            with torch.inference_mode(False):
                for bound, data, _ in before:
                    bound.tensor.data = data
            self.backward.forward_only = False

    # --- binding

    def _slice(self, shard: Shard) -> slice:
        low = self._parts.place(shard.offset_bytes)
        return slice(low, low + shard.size_bytes)

    def _look_for_buffers(self) -> None:
        for bound, (module, name) in zip(self._bound_buffers, self._holders, strict=True):
            bound.tensor = module.get_buffer(name)

    def _bind(self, bound: BoundTensor) -> None:
        """Let the model's tensor be the view, or have its values."""
        tensor = bound.tensor
        if tensor.device == bound.view.device:
            if tensor.data_ptr() != bound.address:
                tensor.data = bound.view
        else:
            with torch.no_grad():
                tensor.copy_(bound.view)

    def _bind_new(self, index: int) -> BoundTensor:
        spec, low = self._layout.tensors[index], self._layout.offsets_bytes[index]
        high = low + spec.size_bytes
        place = self._parts.place(low) if spec.numel else 0
        dtype = to_torch(spec.dtype)
        # A storage of its own: torch.save() takes none that tensors of several dtypes share, and writes it whole.
        flat = (
            torch.frombuffer(self._window.buffer, dtype=dtype, count=spec.numel, offset=place)
            if spec.numel
            else self._memory[:0].view(dtype)
        )
        view = flat.view(spec.shape)
        trained = self._layout.shards_of(TensorRole.TRAINED) if spec.role is TensorRole.TRAINED else ()
        shards = tuple(s.index for s in trained if s.offset_bytes < high and low < s.offset_bytes + s.size_bytes)
        module, name = holder_of(self._model, next(each for each in spec.names if _has(self._model, each)))
        tensor = module.get_buffer(name) if spec.role is TensorRole.BUFFER else module.get_parameter(name)
        return BoundTensor(index, spec.name, spec.role, tensor, view, view.data_ptr(), shards)


def _refuse_another(model: nn.Module, layout: Layout, stage: int) -> None:
    """Raise UsageError if the model is not the one any more that the layout was made of."""

    def described(names: Iterable[str], spec: TensorSpec) -> tuple[object, ...]:
        return set(names), spec.shape, spec.dtype, spec.role

    here = describe_model(model, _no_group)
    now = {min(each.names): described(each.names, each) for each in here}
    present = {name for each in here for name in each.names}
    made_of = {}
    for spec in layout.tensors:
        if stage in spec.stages:
            names = present.intersection(spec.names) or spec.names  # a stage has some of tied names
            made_of[min(names)] = described(names, spec)
    for name in sorted(now.keys() | made_of.keys()):
        if now.get(name) != made_of.get(name):
            raise UsageError(
                f"{name} was frozen, unfrozen, added, replaced or tied between psa.Worker(…) and `with`: change the "
                "model before psa.Worker is made"
            )


def _has(model: nn.Module, name: str) -> bool:
    path, _, last = name.rpartition(".")
    try:
        return hasattr(model.get_submodule(path), last)
    except AttributeError:
        return False


def _no_group(_name: str, _shape: tuple[int, ...]) -> int:
    return 0
