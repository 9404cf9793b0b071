"""Whether the model is still the one that the job trains: its parameters are the servers' to change.

In plain torch a script may write to parameters, freeze and unfreeze them, replace them or tie them. Here such a change
would be in one process only, until the next version or until the process dies, so it is refused by name at the next
``worker.step()``, before anything that was computed with it is pushed.

A write shows in the version counter of a parameter, or in the address of its memory. One through ``.data`` shows in
neither: memory that servers share knows of it (see :class:`psa_store.wire.Window`), and where parameters come by value
some bytes of one parameter a step are compared, in turn.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor, nn

from psa_store.errors import UsageError
from psa_store.job.layout import TensorRole
from psa_store.optim.tensors import as_bytes
from psa_store.worker.backward import BoundTensor, sample_digest
from psa_store.worker.script import script_line


class ModelGuard:
    """``bound``: the tensors of ``model`` and their places."""

    def __init__(self, model: nn.Module, bound: Sequence[BoundTensor]) -> None:
        self._model = model
        self._bound = [each for each in bound if each.role is not TensorRole.BUFFER]
        self._buffers = [(each, *holder_of(model, each.name)) for each in bound if each.role is TensorRole.BUFFER]
        """With each, its module and its name there: a script may put another tensor in its place."""
        self._buffer_holders = [module._buffers for module in model.modules()]
        self._persistent = _persistent_buffers(model)
        self._buffers_seen = self._count_buffers()
        self._buffers_kept = [each for each in self._buffers if each[0].name in self._persistent]
        self._buffer_marks: list[tuple[int, int]] | None = None
        """None: a batch is computed, which may write to them."""
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._holders: list[dict[str, Any]] = [
            holder for module in model.modules() for holder in (module._parameters, module._modules)
        ]
        """Where modules keep parameters and further modules: looking into them is quicker than to walk the model."""
        self._held = [(holder, name, held) for holder in self._holders for name, held in holder.items()]
        self._bytes = [as_bytes(each.view.view(-1)) for each in self._bound]
        self._counters: list[int] = []
        self._turn = 0
        self._digest = 0
        self.renew()
        self.renew_buffers()

    def renew(self) -> None:
        """The parameters are as they should be: what is written from now on, the script writes."""
        self._counters = [bound.tensor._version for bound in self._bound]
        if self._bound:
            self._turn += 1
            self._digest = self._sample()

    def check(self) -> None:
        """Refuse what the script has changed since.

        Raises:
            UsageError: it names a parameter, and says what to write instead.
        """
        if len(self._held) != sum(map(len, self._holders)) or any(
            holder.get(name) is not held for holder, name, held in self._held
        ):
            self._check_structure()
        self.check_parameters()
        if self._bound and self._sample() != self._digest:
            self.refuse_write(self._bound[self._turn % len(self._bound)].name)
        self._check_buffers()

    def check_parameters(self) -> None:
        """Refuse what autograd, or the address, tells of parameters; raises UsageError as :meth:`check`."""
        for bound, counter in zip(self._bound, self._counters, strict=True):
            tensor = bound.tensor
            if tensor.requires_grad is not (bound.role is TensorRole.TRAINED):
                _refuse(
                    bound.name,
                    f"has requires_grad={tensor.requires_grad} now",
                    "a job trains the same parameters from its first step to its last; set that before psa.Worker is "
                    "made, or leave it trained and set its .grad to None where it should not move",
                )
            moved = tensor.device == bound.view.device and tensor.data_ptr() != bound.address
            if moved or tensor._version != counter:
                self.refuse_write(bound.name)

    def renew_buffers(self) -> None:
        """Buffers are as a batch has left them, or as their version has them."""
        self._buffer_marks = [_mark(module._buffers.get(key)) for _, module, key in self._buffers_kept]

    def check_buffers_kept(self) -> None:
        """Refuse what the script has written to buffers since, outside of a batch: the version's take their place now.

        Raises:
            UsageError: it names a buffer. Caches, which are not persistent, may change.
        """
        if self._buffer_marks is None:
            return
        for (bound, module, key), mark in zip(self._buffers_kept, self._buffer_marks, strict=True):
            if _mark(module._buffers.get(key)) != mark:
                raise UsageError(
                    f"{script_line()}: buffer {bound.name} was written between worker.step() and the next batch, maybe "
                    "by a forward pass in training mode. A version has the buffers that rank 0's batch leaves: write "
                    "it between that batch and worker.step(), and evaluate with model.eval()"
                )

    def release_buffers(self) -> None:
        """A batch may write to them."""
        self._buffer_marks = None

    def _check_buffers(self) -> None:
        """They may change, by assignment too, but not their number, nor what they are."""
        for bound, module, key in self._buffers:
            buffer = module._buffers.get(key)
            if buffer is None:
                _refuse(bound.name, "is gone", "keep it, and let it have other values", "buffer")
            if buffer.shape != bound.view.shape or buffer.dtype is not bound.view.dtype:
                now, before = (f"{each.dtype} of shape {tuple(each.shape)}" for each in (buffer, bound.view))
                _refuse(
                    bound.name,
                    f"is {now} now, it was {before}",
                    "give it that form before psa.Worker is made",
                    "buffer",
                )
        seen = self._count_buffers()
        if seen != self._buffers_seen:
            for name in sorted(_persistent_buffers(self._model) - self._persistent):
                _refuse(name, "is new", "register it before psa.Worker is made, or with persistent=False", "buffer")
            self._buffers_seen = seen

    def _count_buffers(self) -> int:
        return sum(buffer is not None for holder in self._buffer_holders for buffer in holder.values())

    def _check_structure(self) -> None:
        present = dict(self._model.named_parameters(remove_duplicate=False))
        for name, parameter in present.items():
            if name not in self._parameters:
                _refuse(name, "is new", "add it before psa.Worker is made")
            if self._parameters[name] is not parameter:
                _refuse(name, "was replaced by another object", "replace it before psa.Worker is made")
        for name in self._parameters.keys() - present.keys():
            _refuse(name, "is gone", "remove it before psa.Worker is made")

    @staticmethod
    def refuse_write(name: str) -> NoReturn:
        """The script has written to a parameter of this name."""
        _refuse(
            name,
            "was written by the script",
            "servers keep the parameters; load weights before psa.Worker is made, and change them through gradients",
        )

    def _sample(self) -> int:
        turns, index = divmod(self._turn, len(self._bound))
        return sample_digest(self._bytes[index], turns)


def holder_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and the tensor's name there."""
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def _mark(buffer: Tensor | None) -> tuple[int, int]:
    """Another one after each assignment, and after each write that autograd knows of."""
    return id(buffer), 0 if buffer is None or buffer.is_inference() else buffer._version


def _persistent_buffers(model: nn.Module) -> frozenset[str]:
    """Names of those that are there and belong to ``state_dict()``; others are mostly caches of what is computed."""
    return frozenset(
        f"{module_name}.{name}".lstrip(".")
        for module_name, module in model.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    )


def _refuse(name: str, change: str, instead: str, what: str = "parameter") -> NoReturn:
    raise UsageError(f"{what} {name} {change}, since the last worker.step(): {instead}")
