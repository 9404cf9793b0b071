"""What one stage hands to the next, and gets back: a few tensors, as they travel.

A parcel is a description (dtypes, shapes, which of them want gradients) and the bytes of the tensors behind it: in one
payload where it goes by value, in memory of its own within a host.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor
from xxhash import xxh3_64

from psa_store.errors import Refused, UsageError
from psa_store.optim.tensors import as_bytes, name_of, to_torch
from psa_store.wire import RELAY_HEAD, SharedMemory

_ALIGN_BYTES = 64
"""As in the layout: vector kernels may give other last bits for other alignments."""
_DTYPES = frozenset(name_of(each) for each in vars(torch).values() if isinstance(each, torch.dtype))
_DESCRIPTION: TypeAdapter[
    tuple[tuple[tuple[str, tuple[int, ...]] | None, ...], tuple[bool, ...], bool, float | None]
] = TypeAdapter(tuple[tuple[tuple[str, tuple[int, ...]] | None, ...], tuple[bool, ...], bool, float | None])


@dataclass(frozen=True, slots=True)
class Parcel:
    """``tensors``: detached; None where there is no gradient. ``single``: a stage returned a tensor, not a tuple.

    ``weight``: with the last gradients of a rank, that of the rank in the mean over ranks; None if all count alike.
    """

    tensors: tuple[Tensor | None, ...]
    wants_gradient: tuple[bool, ...]
    single: bool = False
    weight: float | None = None

    def describe(self) -> bytes:
        """What a reader has to know of it, padded so that tensors may follow."""
        each = [None if t is None else [name_of(t.dtype), list(t.shape)] for t in self.tensors]
        text = json.dumps([each, self.wants_gradient, self.single, self.weight]).encode()
        head = RELAY_HEAD.pack(len(text), self.size_bytes)
        return (head + text).ljust(_rounded(len(head) + len(text)))

    @property
    def size_bytes(self) -> int:
        return sum(_rounded(t.numel() * t.element_size()) for t in self.tensors if t is not None)

    def copy(self) -> Parcel:
        """The same with tensors of its own, which want gradients where these do."""
        copies = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in self.tensors]
        return replace(self, tensors=tuple(copies))

    def digest(self) -> int:
        """Of the numbers."""
        digest = xxh3_64()
        for tensor in self.tensors:
            if tensor is not None:
                digest.update(as_bytes(tensor.detach().reshape(-1).cpu()))
        return digest.intdigest()

    def write(self, memory: Tensor) -> None:
        """Write the tensors into flat uint8 memory, one after the other, with zeros between: relays compare bytes."""
        low = 0
        for tensor in self.tensors:
            if tensor is not None:
                size_bytes = tensor.numel() * tensor.element_size()
                end = low + _rounded(size_bytes)
                memory[low : low + size_bytes].view(tensor.dtype).copy_(tensor.reshape(-1))
                memory[low + size_bytes : end].zero_()
                low = end


def by_value(parcel: Parcel) -> memoryview:
    """The payload of a parcel that travels by value."""
    description = parcel.describe()
    payload = torch.empty(len(description) + parcel.size_bytes, dtype=torch.uint8)
    payload[: len(description)] = torch.frombuffer(bytearray(description), dtype=torch.uint8)
    parcel.write(payload[len(description) :])
    return as_bytes(payload)


class CarryPool:
    """Memory in which parcels are passed within a host: used again in a later step, which is several times faster."""

    def __init__(self) -> None:
        self._free: list[SharedMemory] = []
        self._taken: list[SharedMemory] = []

    def write(self, parcel: Parcel) -> SharedMemory:
        """The tensors of a parcel in memory that can be passed; its description is the payload."""
        size_bytes = parcel.size_bytes
        fits = [each for each in self._free if size_bytes <= len(each.buffer) <= 2 * size_bytes]
        memory = min(fits, key=lambda each: len(each.buffer), default=None)
        if memory is None:
            memory = SharedMemory.create("carry", size_bytes)
        else:
            self._free.remove(memory)
        self._taken.append(memory)
        parcel.write(torch.frombuffer(memory.buffer, dtype=torch.uint8))
        return memory

    def release(self) -> None:
        """The step is over: what cells read of it now counts no more."""
        self._free, self._taken = self._taken, []

    def give_up(self) -> None:
        """The connections are gone, and cells of this step may still read what was passed: never use it again."""
        self._taken = []


def read(payload: memoryview, descriptor: int | None) -> Parcel:
    """Read a parcel that has come; takes over the descriptor.

    Raises:
        Refused: it is none.
    """
    try:
        length, _ = RELAY_HEAD.unpack_from(payload)
        said = json.loads(bytes(payload[RELAY_HEAD.size : RELAY_HEAD.size + length]))
        described, wants_gradient, single, weight = _DESCRIPTION.validate_python(said)
        sizes = [0 if each is None else _size_bytes(*each) for each in described]
        whole = sum(map(_rounded, sizes))
        if len(wants_gradient) != len(described):
            raise ValueError("not as many tensors as it says")
        if descriptor is not None:
            memory = SharedMemory.attach(os.dup(descriptor), whole)
            flat = torch.frombuffer(memory.buffer, dtype=torch.uint8)
        else:
            flat = _aligned(torch.frombuffer(payload, dtype=torch.uint8)[_rounded(RELAY_HEAD.size + length) :])
        if whole > len(flat):
            raise ValueError(f"{len(flat)} bytes of {whole}")
        tensors: list[Tensor | None] = []
        low = 0
        for each, size_bytes in zip(described, sizes, strict=True):
            part = flat[low : low + size_bytes]
            tensors.append(None if each is None else part.view(to_torch(each[0])).view(each[1]))
            low += _rounded(size_bytes)
    except (struct.error, ValueError, RecursionError, RuntimeError) as error:
        raise Refused(f"RELAY of something that is no carry: {error}") from error
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return Parcel(tuple(tensors), wants_gradient, single, weight)


def of_stage(returned: Any, stage: int) -> Parcel:
    """What a stage returned, for the next one.

    Raises:
        UsageError: it is no tensor and no tuple of tensors.
    """
    single = isinstance(returned, Tensor)
    tensors: Sequence[Any] = returned if isinstance(returned, tuple | list) else (returned,)
    if not tensors:
        raise UsageError(f"stage {stage} returned nothing for the next one: return a tensor or a tuple of tensors")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise UsageError(
                f"stage {stage} returned a {type(returned).__name__} with a {type(tensor).__name__} in it: a stage "
                "returns a tensor or a tuple of tensors for the next one, and the last one the loss"
            )
    return Parcel(tuple(map(as_it_travels, tensors)), tuple(t.requires_grad for t in tensors), single)


def as_it_travels(tensor: Tensor) -> Tensor:
    """The same numbers as the next stage gets them, also where it is here: in order, and aligned as in the layout.

    Kernels go by both, so last bits would depend on which worker holds the next stage.
    """
    return _aligned(tensor.detach().contiguous())


def _aligned(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.data_ptr() % _ALIGN_BYTES else tensor


def _size_bytes(dtype: str, shape: Sequence[int]) -> int:
    if dtype not in _DTYPES or any(length < 0 for length in shape):
        raise ValueError(f"{dtype} of shape {shape}")
    return math.prod(shape) * to_torch(dtype).itemsize


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _ALIGN_BYTES) * _ALIGN_BYTES
