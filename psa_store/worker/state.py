"""``worker.state``: a small dictionary of the script that belongs to a version, as the parameters do.

It travels as a buffer of the model does: bytes of rank 0 that are pushed with its gradient, committed with the version,
and shown to all workers with it. So what a batch finds in it is a function of (version, rank), whatever has died.

The bytes: two numbers (int64, the length and a digest of what follows), a JSON text with its length before it, and the
tensors' bytes to which it refers.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from xxhash import xxh3_64_intdigest

from psa_store import logs
from psa_store.errors import UsageError
from psa_store.optim.tensors import as_bytes, name_of, to_torch
from psa_store.worker.batches import RankStep

BUFFER = "psa_state"
"""The name of the buffer, which is not part of ``state_dict()``."""
STATE_BYTES_MAX = 1 << 20
_STATE_BYTES_MIN = 16 << 10
_ROOM = 4
"""By how much it may grow, compared with what it is in the beginning."""
_HEAD = struct.Struct("<qQ")
_LENGTH = struct.Struct("<q")
_TENSOR = "__tensor__"


class ScriptState:
    """Keeps ``values`` and the buffer of ``model`` alike. Used by the thread that runs the model.

    Raises:
        UsageError: ``initial`` holds what is neither JSON nor a tensor, or too much of it.
    """

    def __init__(self, model: nn.Module, initial: Mapping[str, Any]) -> None:
        self._model = model
        self.values = values_of(initial)
        encoded = encode(self.values)
        self._known = encoded
        """What ``values`` were when they and the buffer were the same."""
        self._step_of_rank_0: int | None = None
        """The last one that was computed here."""
        if BUFFER not in model._buffers:
            model.register_buffer(BUFFER, None, persistent=False)
        setattr(model, BUFFER, torch.zeros(room_for(encoded), dtype=torch.uint8))
        self._write(encoded)

    def close(self) -> None:
        """Take the buffer out of the model; ``values`` stay."""
        delattr(self._model, BUFFER)

    def begin(self, rank_step: RankStep) -> None:
        """A batch is about to be handed out: show what its version has.

        Raises:
            UsageError: it was changed since, before the batch of another rank than 0.
        """
        if rank_step.rank != 0 and encode(self.values) != self._known:
            if self._step_of_rank_0 != rank_step.step - 1:
                raise UsageError(
                    f"worker.state was changed before a batch of rank {rank_step.rank}, which finds what its version "
                    "has: change it between a batch of rank 0 and its worker.step(), `if worker.rank == 0:`"
                )
            say_lost("rank 0 has gone to another worker")
            self._show()
        self.load()

    def end(self) -> None:
        """No batch comes any more."""
        if self._step_of_rank_0 is not None and encode(self.values) != self._known:
            say_lost("no step of rank 0 came after it here")
        self.load()

    def load(self) -> None:
        """Show what the buffer has, if that is not what was known."""
        buffer = self._bytes()
        if buffer[: _HEAD.size] == self._known[: _HEAD.size]:
            return
        self._known = encoded_part(buffer)
        self._show()

    def save(self, rank_step: RankStep) -> None:
        """Have what the script left in the buffer, to be pushed with the gradient of rank 0.

        Raises:
            UsageError: it was changed in the batch of another rank, or is too large.
        """
        encoded = encode(self.values)
        if rank_step.rank == 0:
            self._write(encoded)
            self._known, self._step_of_rank_0 = encoded, rank_step.step
        elif encoded != self._known:
            raise UsageError(
                f"worker.state was changed in a batch of rank {rank_step.rank}; it belongs to rank 0: write "
                "`if worker.rank == 0:` before it"
            )

    def _show(self) -> None:
        """Let ``values`` be what is known."""
        values = decode(self._known)
        self.values.clear()
        self.values.update(values)

    def _write(self, encoded: bytes) -> None:
        buffer = self._bytes()
        check_room(encoded, len(buffer))
        if buffer[: _HEAD.size] != encoded[: _HEAD.size]:
            buffer[: len(encoded)] = encoded

    def _bytes(self) -> memoryview:
        """The buffer where the model has it now."""
        return as_bytes(self._model.get_buffer(BUFFER))


def values_of(initial: object) -> dict[str, Any]:
    """What a script begins with; raises UsageError if it is no dictionary."""
    if not isinstance(initial, Mapping):
        raise UsageError(f"psa.Worker(state=): a {type(initial).__name__}; give a dictionary, such as state={{}}")
    return dict(initial)


def room_for(encoded: bytes) -> int:
    """How many bytes a state may have that begins so."""
    return min(STATE_BYTES_MAX, max(_STATE_BYTES_MIN, _ROOM * len(encoded)))


def check_room(encoded: bytes, room: int) -> None:
    """Raise UsageError if a state has become too large."""
    if len(encoded) > room:
        raise UsageError(
            f"worker.state has {len(encoded)} bytes, and there is room for {room}: {_ROOM} times what it had in the "
            f"beginning, at least {_STATE_BYTES_MIN} and at most {STATE_BYTES_MAX}. Begin with larger values in "
            "psa.Worker(…, state=), or keep large things elsewhere"
        )


def say_lost(why: str) -> None:
    """Log that what the script has changed goes to no version."""
    logs.get_logger().warning(
        "a change of worker.state after worker.step() is lost: make it before that, in the batch of rank 0", why=why
    )


def encoded_part(buffer: memoryview | bytearray) -> bytes:
    """What :func:`encode` has made, without the room behind it."""
    length, _ = _HEAD.unpack_from(buffer)
    return bytes(buffer[: _HEAD.size + length])


def encode(values: Mapping[str, Any]) -> bytes:
    """Turn it into bytes; the same values give the same."""
    tensors: list[Tensor] = []
    try:
        plain = _plain(values, "worker.state", tensors)
    except RecursionError:
        raise UsageError("worker.state holds itself, or is nested too deeply") from None
    text = json.dumps(plain, sort_keys=True, separators=(",", ":")).encode()
    body = b"".join((_LENGTH.pack(len(text)), text, *(bytes(as_bytes(each.view(-1))) for each in tensors)))
    return _HEAD.pack(len(body), xxh3_64_intdigest(body)) + body


def decode(encoded: bytes) -> dict[str, Any]:
    """Read :func:`encode` back."""
    low = _HEAD.size + _LENGTH.size
    (length,) = _LENGTH.unpack_from(encoded, _HEAD.size)
    values = _restored(json.loads(encoded[low : low + length]), encoded, low + length)
    assert isinstance(values, dict)
    return values


def _plain(value: Any, where: str, tensors: list[Tensor]) -> Any:
    """As JSON has it, with a reference for each tensor: dtype, shape, and where its bytes begin."""
    if isinstance(value, Tensor):
        start = sum(each.nbytes for each in tensors)
        tensors.append(value.detach().cpu().contiguous())
        return {_TENSOR: [name_of(value.dtype), list(value.shape), start]}
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) and key != _TENSOR for key in value):
            raise UsageError(f"{where} has a key that is no string")
        # In the order of the text, so that what is read again is written alike.
        return {key: _plain(value[key], f"{where}[{key!r}]", tensors) for key in sorted(value)}
    if isinstance(value, list):
        return [_plain(each, f"{where}[{index}]", tensors) for index, each in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    hint = " (.item() makes it a number)" if isinstance(value, np.generic) else ""
    raise UsageError(
        f"{where} is a {type(value).__name__}{hint}: it can hold numbers, strings, lists, dictionaries and tensors"
    )


def _restored(value: Any, encoded: bytes, low: int) -> Any:
    if isinstance(value, list):
        return [_restored(each, encoded, low) for each in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        name, shape, start = value[_TENSOR]
        tensor = torch.empty(shape, dtype=to_torch(name))
        as_bytes(tensor.view(-1))[:] = encoded[low + start : low + start + tensor.nbytes]
        return tensor
    return {key: _restored(each, encoded, low) for key, each in value.items()}
