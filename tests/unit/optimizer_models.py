"""One model under the kernels, as a server drives them, and under ``torch.optim``, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from psa_store import optim
from psa_store.job.dtypes import ITEM_BYTES
from psa_store.job.layout import PAGE_BYTES, TensorRole, TensorSpec, make_layout
from psa_store.optim.kernels import ShardKernel, init_slots, make_scratch
from psa_store.optim.reduce import clip_factor, squared_norm
from psa_store.optim.tensors import name_of, to_torch
from tests.unit.optimizers import Lion

SHAPES = {"0.weight": (67, 33), "0.bias": (33,), "1.gain": (), "1.weight": (5, 7, 9), "1.bias": (1001,)}


class Model:
    """Parameters spread over shards, driven as a server drives them."""

    def __init__(self, optimizer: optim.Optimizer, dtype: str = "float32", seed: int = 0) -> None:
        self.optimizer = optimizer
        self.dtype = to_torch(dtype)
        self.random = torch.Generator().manual_seed(seed)
        self.layout = make_layout(
            [
                TensorSpec((name,), shape, dtype, TensorRole.TRAINED, optimizer.group_of(name, shape))
                for name, shape in SHAPES.items()
            ],
            PAGE_BYTES,
        )
        self.initial = self.draw()
        self.params = self.flatten(self.initial, self.dtype)
        self.slots = [
            init_slots(optimizer, param, shard, self.layout)
            for param, shard in zip(self.params, self.layout.shards, strict=True)
        ]
        self.kernels = [
            ShardKernel(optimizer, self.layout, shard, param, slots)
            for shard, param, slots in zip(self.layout.shards, self.params, self.slots, strict=True)
        ]

    def draw(self) -> dict[str, Tensor]:
        return {
            name: torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)
            for name, shape in SHAPES.items()
        }

    def flatten(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> list[Tensor]:
        flat = [torch.zeros(shard.numel, dtype=dtype) for shard in self.layout.shards]
        for place, name, start, end in self.places(flat):
            place.copy_(tensors[name].flatten()[start:end])
        return flat

    def unflatten(self, flat: list[Tensor]) -> dict[str, Tensor]:
        tensors = {name: torch.empty(shape, dtype=flat[0].dtype) for name, shape in SHAPES.items()}
        for place, name, start, end in self.places(flat):
            tensors[name].view(-1)[start:end] = place
        return tensors

    def places(self, flat: list[Tensor]) -> Iterator[tuple[Tensor, str, int, int]]:
        for tensor, shard in zip(flat, self.layout.shards, strict=True):
            for piece in shard.pieces:
                place = tensor[piece.shard_start : piece.shard_start + piece.length]
                name = self.layout.tensors[piece.tensor].name
                yield place, name, piece.tensor_start, piece.tensor_start + piece.length

    def update(self, grads: Mapping[str, Tensor], step: int, *, grad_scale: float = 1.0) -> None:
        wide = self.dtype if ITEM_BYTES[name_of(self.dtype)] >= 4 else torch.float32
        for kernel, grad in zip(self.kernels, self.flatten(grads, wide), strict=True):
            kernel.apply([grad], make_scratch(), step=step, opt_step=step, grad_scale=grad_scale)

    def state(self) -> list[Tensor]:
        return [*self.params, *(tensor for slots in self.slots for tensor in slots.values())]


def torch_numbers(optimizer: optim.Optimizer, group: int) -> dict[str, Any]:
    numbers = optimizer.in_group(group).to_dict()
    return {key: numbers[key] for key in numbers.keys() - {"name", "lr", "clip_grad_norm", "groups"}}


class Reference:
    """The same model under torch.optim, tensor by tensor, without fused or foreach kernels."""

    def __init__(self, optimizer: optim.Optimizer, initial: Mapping[str, Tensor]) -> None:
        self.spec = optimizer
        self.params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in initial.items()}
        members: dict[int, list[Tensor]] = {}
        for name, param in self.params.items():
            members.setdefault(optimizer.group_of(name, param.shape), []).append(param)
        self.groups = sorted(members)
        cls: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, type(optimizer).__name__, Lion)
        self.optimizer = cls(
            [{"params": members[group], **torch_numbers(optimizer, group)} for group in self.groups],
            foreach=False,
            **torch_numbers(optimizer, 0),
        )

    def update(self, grads: Mapping[str, Tensor], step: int) -> None:
        for name, param in self.params.items():
            param.grad = grads[name].clone()
        if self.spec.clip_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.params.values(), self.spec.clip_grad_norm)
        for group, torch_group in zip(self.groups, self.optimizer.param_groups, strict=True):
            torch_group["lr"] = self.spec.lr_at(step, group)
        self.optimizer.step()

    def slot(self, name: str, key: str) -> Tensor:
        value = self.optimizer.state[self.params[name]][key]
        assert isinstance(value, Tensor)
        return value


def train_both(optimizer: optim.Optimizer, dtype: str = "float32", steps: int = 25) -> tuple[Model, Reference]:
    """Half precision: beside a reference in float32, which is what the master should be."""
    model = Model(optimizer, dtype)
    wide = torch.float32 if model.dtype.itemsize == 2 else model.dtype
    reference = Reference(optimizer, {name: tensor.to(wide) for name, tensor in model.initial.items()})
    for step in range(steps):
        grads = {name: grad.to(wide) for name, grad in model.draw().items()}
        flat = model.flatten(grads, wide)
        scale = clip_factor([squared_norm(grad) for grad in flat], optimizer.clip_grad_norm)
        model.update(grads, step, grad_scale=scale)
        reference.update(grads, step)
    return model, reference


ERROR_STEPS = 50


def with_all_of_it(optimizer: optim.Optimizer) -> optim.Optimizer:
    """The same with a schedule, a limit of the norm, and groups."""
    assert isinstance(optimizer.lr, float)
    schedule = optim.warmup_cosine(optimizer.lr, warmup=5, total=40, final=optimizer.lr / 10)
    others: dict[str, Any] = {"eps": 1e-4} if "eps" in optimizer.overridable else {"weight_decay": 0.05}
    if "betas" in optimizer.overridable:
        others["betas"] = (0.7, 0.9)
    groups = [optim.group("*.bias", lr_scale=2.0, weight_decay=0.0), optim.group("1.*", **others)]
    return replace(optimizer, lr=schedule, clip_grad_norm=5.0, groups=groups)


def largest_error(optimizer: optim.Optimizer, dtype: str) -> float:
    """The largest difference of an element from torch's, after 50 steps, in units of the largest element."""
    model, reference = train_both(optimizer, dtype, ERROR_STEPS)
    ours = model.unflatten([slots.get("master", param) for slots, param in zip(model.slots, model.params, strict=True)])
    pairs = [(ours[name], param.detach()) for name, param in reference.params.items()]
    return max(float((mine - theirs).abs().max()) for mine, theirs in pairs) / max(
        float(theirs.abs().max()) for _, theirs in pairs
    )
