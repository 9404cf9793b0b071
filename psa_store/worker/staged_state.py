"""``worker.state`` of a model in stages: as in :mod:`psa_store.worker.state`, but made where the loss is.

Its bytes are a buffer that all stages have, so whichever cells a worker holds, it finds them with the version. Rank 0's
cell of the last stage pushes them, behind its gradient. Which worker has computed that turns out in the middle of a
batch, as cells move alone. So the script may change it from :meth:`psa_store.Worker.compute`, which returns the loss
there, to ``worker.step()``, and nowhere else.

Used by the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import nn

from psa_store.consistency import RANK_OF_BUFFERS
from psa_store.errors import UsageError
from psa_store.job.layout import Layout, Piece, Shard
from psa_store.worker.batches import RankStep
from psa_store.worker.state import BUFFER, check_room, decode, encode, encoded_part, room_for, say_lost, values_of


class StagedScriptState:
    """Keeps ``values`` as the present version has them, or as the script has left them for the next.

    Raises:
        UsageError: ``initial`` holds what is neither JSON nor a tensor, or too much of it.
    """

    def __init__(self, initial: Mapping[str, Any], stages: int) -> None:
        self.values = values_of(initial)
        self._last = stages - 1
        self._known = encode(self.values)
        """What ``values`` are if the script has not changed them."""
        room = room_for(self._known)
        check_room(self._known, room)
        self._initial = self._known.ljust(room, b"\0")
        self._bytes = bytearray(self._initial)
        """Of the present version."""
        self._saved = self._known
        """What the next one is to have."""
        self._pieces: dict[int, list[Piece]] = {}
        self._may_change = self._given_up = False

    def close(self) -> None:
        """Nothing: ``values`` stay."""

    # --- the buffer

    def attach(self, module: nn.Module) -> None:
        """Let a stage that was built have the buffer, as the job begins with it."""
        initial = torch.frombuffer(bytearray(self._initial), dtype=torch.uint8)
        module.register_buffer(BUFFER, initial, persistent=False)

    def lies_in(self, layout: Layout) -> None:
        """Know the buffer's place."""
        index = next(i for i, spec in enumerate(layout.tensors) if spec.name == BUFFER)
        pieces = {shard.index: [each for each in shard.pieces if each.tensor == index] for shard in layout.shards}
        self._pieces = {shard: some for shard, some in pieces.items() if some}

    @property
    def shards(self) -> Collection[int]:
        """Those that have a part of it."""
        return self._pieces.keys()

    def arrived(self, shard: int, data: memoryview) -> None:
        """A shard has come with a version."""
        for piece in self._pieces[shard]:
            low, start = piece.tensor_start, piece.shard_start
            self._bytes[low : low + piece.length] = data[start : start + piece.length]

    def to_push(self, shard: Shard, rest: memoryview | bytes) -> bytes:
        """The bytes of a shard as the next version is to have it. ``rest``: what else is in it."""
        data, whole = bytearray(rest), bytearray(self._bytes)
        whole[: len(self._saved)] = self._saved
        for piece in self._pieces[shard.index]:
            low, start = piece.tensor_start, piece.shard_start
            data[start : start + piece.length] = whole[low : low + piece.length]
        return bytes(data)

    # --- a batch

    def begin(self, _rank_step: RankStep) -> None:
        """A batch is about to be handed out: show what its version has; raises UsageError as :meth:`save`."""
        self.computing()
        self._may_change = self._given_up = False
        self.load()

    def computing(self) -> None:
        """The passes are about to be made; raises UsageError as :meth:`save`."""
        if encode(self.values) != self._known:
            self._refuse()

    def computed(self, rank: int, stages: Collection[int]) -> None:
        """The cells of a batch were computed here; of no stage, if the batch may come again."""
        self._may_change = rank == RANK_OF_BUFFERS and self._last in stages
        self._given_up = not stages

    def save(self, _rank_step: RankStep) -> None:
        """Have what the script left pushed, if it is of this worker.

        Raises:
            UsageError: it was changed where the loss of rank 0 was not, or is too large.
        """
        encoded = encode(self.values)
        if self._may_change:
            check_room(encoded, len(self._bytes))
            self._known = self._saved = encoded
        elif encoded != self._known and self._given_up:
            self._known = b""  # nothing of this batch counts: what is shown next is the version's
        elif encoded != self._known:
            self._refuse()

    def load(self) -> None:
        """Show what the version has, if that is not what was known."""
        encoded = encoded_part(self._bytes)
        if encoded != self._known:
            self._known = encoded
            values = decode(encoded)
            self.values.clear()
            self.values.update(values)

    def end(self) -> None:
        """No batch comes any more."""
        if encode(self.values) != self._known:
            say_lost("no batch came after it")
            self._known = b""
        self.load()

    @staticmethod
    def _refuse() -> NoReturn:
        raise UsageError(
            "worker.state was changed where the loss of rank 0 was not. With stages it belongs to the cell that makes "
            "this loss: change it between worker.compute() and worker.step(), `if loss is not None and "
            "worker.rank == 0:`"
        )
