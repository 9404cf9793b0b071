"""The gradient of one rank: from where autograd leaves it into flat memory, and when it may leave from there.

What counts is what a script has in ``.grad`` when it calls ``worker.step()``: it may have clipped it, added noise,
replaced it, or dropped it. To push a shard in the middle of backward is faster, and right only in a script that does
nothing of the kind. So the first steps wait for ``worker.step()``, and look. If no gradient was changed in them, the
later ones push each shard as soon as it is whole, and a change is refused by name.

A change shows in the identity of ``.grad``, or in its version counter, with which autograd guards itself. A write
through ``.data`` or numpy shows in neither: while it is being found out, the bytes are compared, and then some of those
of one gradient a step, in turn.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor
from xxhash import xxh3_64_intdigest

from psa_store.errors import UsageError
from psa_store.job.layout import TensorRole
from psa_store.optim.note import GradientNote
from psa_store.optim.tensors import as_bytes
from psa_store.worker.gradients import GradientMemory
from psa_store.worker.script import script_line

OnReady = Callable[[list[int]], None]
"""Is called with shards whose gradients are whole, in the middle of backward where that is right."""

WATCHED_STEPS = 3
"""Steps that wait for ``worker.step()`` to find out whether the script changes gradients."""
_SAMPLE_BYTES = 64 << 10


@dataclass(slots=True, eq=False)
class BoundTensor:
    """One tensor of the model and its places in the flat memory.

    ``tensor``: the model's present one. ``shards``: the trained shards that it has a part of.
    """

    index: int
    name: str
    role: TensorRole
    tensor: Tensor
    view: Tensor
    address: int
    """Of ``view``."""
    shards: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Taken:
    """A gradient as it was when it became whole. ``digest``: of its bytes, if they are to be compared."""

    gradient: Tensor
    counter: int
    digest: int | None


class Backward:
    """Brings the gradients of ``trained`` into memory that is pushed.

    Args:
        push_early: whether shards are pushed in the middle of backward; None: if the script turns out to allow it.
    """

    def __init__(self, trained: Sequence[BoundTensor], push_early: bool | None) -> None:
        self._trained = trained
        self._early = bool(push_early)
        self._steps_to_watch = WATCHED_STEPS if push_early is None else 0
        self._places_of = Counter(shard for bound in trained for shard in bound.shards)
        """By trained shard, how many tensors have a part of it."""
        self._left: dict[int, int] = {}
        """The same, of those whose gradient is not there yet."""
        self._gradients: GradientMemory
        self._on_ready: OnReady | None = None
        self._open = False
        self._accumulating = False
        self.forward_only = False
        """Whether the model has other values at present than those that are trained."""
        self._again = False
        """Whether backward has come to the same parameter more than once."""
        self._taken: dict[BoundTensor, _Taken] = {}
        self._turn = 0
        """Which gradient's bytes are compared, where those of one are, and which of them."""
        self._hooks = [
            bound.tensor.register_post_accumulate_grad_hook(self._hook_for(bound))  # type: ignore[no-untyped-call]
            for bound in trained
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def begin(self, gradients: GradientMemory, on_ready: OnReady | None) -> None:
        """Get ready for the forward and backward pass of one rank: there are no gradients.

        ``on_ready``: called with every shard once; None: none is wanted before :meth:`end`.
        """
        self._gradients = gradients
        gradients.begin()
        self._on_ready = on_ready
        for bound in self._trained:
            bound.tensor.grad = None
        self._taken = {}
        self._again = False
        self._left = dict(self._places_of)
        self._turn += 1
        self._open = True

    def end(self, weight: float = 1.0) -> None:
        """Take the gradients as they are now, those that have not left.

        ``weight``: of this rank in the mean over ranks, at least 0.

        Raises:
            UsageError: one that has left was changed meanwhile, or is to have another weight.
        """
        self._open = False
        changed = next((bound for bound, taken in self._taken.items() if self._is_changed(bound, taken)), None)
        if self._leaves_early:
            if weight != 1.0 and self._taken:
                what = f"weight={weight}" if weight else "worker.skip(), or weight=0"
                raise UsageError(
                    f"{what}: gradients have left already. The {WATCHED_STEPS} first steps of this process changed "
                    "none and gave no weight, so they are pushed while backward() runs. Write "
                    "psa.Worker(…, push_early=False)"
                )
            if changed is not None:
                raise UsageError(
                    f"the gradient of {changed.name} was changed between backward() and worker.step(), when it "
                    f"had left already: the {WATCHED_STEPS} first steps of this process changed none, so gradients are "
                    "pushed while backward() runs. Write psa.Worker(…, push_early=False)"
                )
            rest = [bound for bound in self._trained if bound not in self._taken]
        else:
            rest = list(self._trained)
            self._watch(changed is not None or (weight != 1.0 and bool(self._taken)))
        absent = frozenset(bound.index for bound in rest if bound.tensor.grad is None)
        if absent or weight != 1.0:
            self._gradients.note = GradientNote(weight, absent)
        complete: list[int] = []
        for bound in rest:
            self._bring(bound)
            complete += self._count(bound)
        if complete and self._on_ready is not None:
            self._on_ready(sorted(complete))
        self._leave_to_script()

    def drop(self) -> None:
        """There is no gradient after all."""
        for bound in self._trained:
            bound.tensor.grad = None

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes inside only add to ``.grad``."""
        self._accumulating = True
        try:
            yield
        finally:
            self._accumulating = False

    @property
    def under_way(self) -> bool:
        """Whether gradients of the present batch are whole, and may have left."""
        return self._open and bool(self._taken)

    @property
    def _leaves_early(self) -> bool:
        return self._early and self._on_ready is not None

    def _hook_for(self, bound: BoundTensor) -> Callable[[Tensor], None]:
        def hook(_tensor: Tensor) -> None:
            if self.forward_only:
                raise UsageError(
                    f"{script_line()}: backward() inside `with worker.average()`, where the model has the average of "
                    "its parameters: only evaluate there"
                )
            if self._open and not self._accumulating:
                self._take(bound)

        return hook

    def _take(self, bound: BoundTensor) -> None:
        """The gradient is whole, unless backward runs again: bring it over while it is in the cache."""
        if bound in self._taken:
            if self._leaves_early:
                raise UsageError(
                    f"{script_line()}: backward() ran twice for one batch: wrap all but the last in "
                    "`with worker.accumulate():`, or write psa.Worker(…, push_early=False)"
                )
            self._again = True  # autograd has added to what is there
            return
        self._bring(bound)
        gradient = bound.tensor.grad
        assert gradient is not None
        compares = self._trained[self._turn % len(self._trained)] is bound if self._early else self._steps_to_watch > 0
        self._taken[bound] = _Taken(gradient, gradient._version, self._digest(bound) if compares else None)
        if self._leaves_early:
            complete = self._count(bound)
            if complete:
                assert self._on_ready is not None
                self._on_ready(complete)

    def _count(self, bound: BoundTensor) -> list[int]:
        """One tensor more is in its place; returns the shards that are whole with it."""
        complete = []
        for shard in bound.shards:
            self._left[shard] -= 1
            if self._left[shard] == 0:
                complete.append(shard)
        return complete

    def _bring(self, bound: BoundTensor) -> None:
        """Have the model's gradient in its place; from then on the model's is that place, if it can be."""
        place, tensor = self._gradients.views[bound.index], bound.tensor
        gradient = tensor.grad
        if gradient is None:
            place.zero_()
        elif gradient.is_sparse or gradient.data_ptr() != place.data_ptr():
            place.copy_((gradient.to_dense() if gradient.is_sparse else gradient).detach())
            if tensor.device == place.device and tensor.dtype is place.dtype:
                tensor.grad = place

    def _leave_to_script(self) -> None:
        """Servers may read the gradient for long after ``worker.step()``: ``zero_grad()`` must not change it there."""
        places, others = self._gradients.views, self._gradients.views_after_step
        for bound in self._trained:
            if bound.tensor.grad is places[bound.index]:
                bound.tensor.grad = others[bound.index]

    def _is_changed(self, bound: BoundTensor, taken: _Taken) -> bool:
        gradient = bound.tensor.grad
        if gradient is not taken.gradient or gradient._version != taken.counter:
            return True
        if taken.digest is None:
            return False
        place = self._gradients.views[bound.index]
        if gradient is not place:
            return not place.equal(gradient.to(place))
        return self._digest(bound) != taken.digest

    def _digest(self, bound: BoundTensor) -> int:
        data = as_bytes(self._gradients.views[bound.index].view(-1))
        return sample_digest(data, self._turn // len(self._trained)) if self._early else xxh3_64_intdigest(data)

    def _watch(self, changed: bool) -> None:
        """Note whether this step would have allowed to push early."""
        if self._steps_to_watch == 0 or not (self._taken or changed):
            return
        if changed or self._again:
            self._steps_to_watch = 0
        else:
            self._steps_to_watch -= 1
            self._early = self._steps_to_watch == 0


def sample_digest(data: memoryview, turn: int) -> int:
    """Of some of these bytes, others in each turn: a few microseconds, and what changed all of them shows at once."""
    low = turn * _SAMPLE_BYTES % max(1, len(data))
    return xxh3_64_intdigest(data[low : low + _SAMPLE_BYTES])
