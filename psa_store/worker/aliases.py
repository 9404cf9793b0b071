"""Parameters that share memory without being one parameter: tied by ``.data``, or views of one tensor.

In plain torch a step on one moves the other as well. In flat memory each tensor has a place of its own, so what a model
says by sharing memory would be lost without a word. Parameters that are one object under several names are tied.

Used by the worker, before a model is bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from psa_store.errors import UsageError


def refuse_aliases(model: nn.Module) -> None:
    """Raise UsageError if a parameter that is trained shares elements with another tensor of the model, or with itself.

    Constants may: buffers with buffers, frozen parameters with each other.
    """
    named = [
        (name, tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.layout is torch.strided and tensor.numel() and not tensor.is_meta
    ]
    for name, tensor in named:
        if tensor.requires_grad and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            raise UsageError(
                f"parameter {name} has several elements in one place of memory, as expand() makes them: let the "
                "smaller tensor be the parameter, and expand it in forward(); or write nn.Parameter(….clone())"
            )
    named.sort(key=lambda each: each[1].data_ptr())
    for index, (name, tensor) in enumerate(named):
        end = tensor.data_ptr() + _span(tensor) * tensor.element_size()
        for other_name, other in named[index + 1 :]:
            if other.data_ptr() >= end:
                break
            if (tensor.requires_grad or other.requires_grad) and _overlap(tensor, other):
                raise UsageError(
                    f"{name} and {other_name} share memory, but are not one parameter: to tie them, let both modules "
                    "have the same object (a.weight = b.weight) before the optimizer is made; else write .clone()"
                )


def _span(tensor: Tensor) -> int:
    """Elements from its first one in memory to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, the memory of which is interleaved, have an element in common; columns of one have none."""
    if one.dtype is not other.dtype or one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return True
    taken = torch.zeros(one.untyped_storage().nbytes() // one.element_size(), dtype=torch.bool)
    taken.as_strided(one.shape, one.stride(), one.storage_offset()).fill_(True)
    return bool(taken.as_strided(other.shape, other.stride(), other.storage_offset()).any())
