"""Stages of a model that exists: its forward pass, cut where named modules begin.

The pass is traced symbolically with torch.fx, as far down as the modules at which it is cut; what lies below them, or
beside them, is called as it is. So only the containers of the named modules have to be of a form that can be traced:
no branch on the values of tensors, and no loop over a number that a tensor gives.

What later stages need of earlier ones travels through all between. What they need of the batch does not travel: each
stage has the batch itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx, nn

from psa_store.errors import UsageError

Loss = Callable[[Any, Any], Any]


def split(
    model: nn.Module | Callable[[Any], Any], cuts: Sequence[str], *, loss: Loss | None = None
) -> list[SplitStage]:
    """Cut a model into stages, for ``psa.Worker(…, stages=psa.split(model, ["layers.2", "layers.4"]))``.

    Args:
        model: called with a micro-batch, as ``model(microbatch)``; or a method of one, which is called so, such as
            ``model.loss``. It is left as it is, and each stage copies its part.
        cuts: names of modules; a stage begins with each of them, in the order in which the forward pass calls them.
        loss: makes the loss, or (loss, weight), of what the model returns and the micro-batch. None: the model returns
            the loss.

    Raises:
        UsageError: the forward pass can not be traced, or does not call these modules in this order.
    """
    method = "forward"
    if not isinstance(model, nn.Module):
        method, owner = getattr(model, "__name__", ""), getattr(model, "__self__", None)
        if not isinstance(owner, nn.Module):
            raise UsageError("psa.split: give an nn.Module, or a method of one")
        model = owner
    modules = dict(model.named_modules())
    for name in cuts:
        if name not in modules or not name:
            near = [each for each in modules if each][:8]
            raise UsageError(f"psa.split: the model has no module {name!r}; its first ones are {', '.join(near)}")
    try:
        graph = _Tracer(cuts, method).trace(model)
    except Exception as error:  # of the model's code, which did not expect to be traced
        raise UsageError(
            f"psa.split can not trace the forward pass of {type(model).__name__}: {type(error).__name__}: {error}. "
            "Write the stages by hand: psa.Worker(stages=[…]) takes functions that build modules"
        ) from error
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    if len([node for node in inputs if not node.args]) > 1:
        raise UsageError(
            f"psa.split: forward() of {type(model).__name__} takes {len(inputs)} arguments; a stage gets one, the "
            "micro-batch. Give a module whose forward(microbatch) calls the model"
        )
    parts = _parts(graph, cuts)
    return [SplitStage(model, graph, parts, index, loss) for index in range(len(parts))]


class SplitStage:
    """Builds one stage, each time a copy of the model's part."""

    def __init__(
        self, model: nn.Module, graph: fx.Graph, parts: Sequence[Sequence[fx.Node]], index: int, loss: Loss | None
    ) -> None:
        self._model = model
        self._loss = loss if index == len(parts) - 1 else None
        self._graph = _stage_graph(graph, parts, index)

    def __call__(self) -> nn.Module:
        """Build the stage."""
        used = dict.fromkeys(str(node.target) for node in self._graph.nodes if node.op in ("call_module", "get_attr"))
        return _Stage(self._model, self._graph, used, self._loss)

    def all_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """All names of the parameter that has these in the stage, in the order of the whole model."""
        everything = [
            *self._model.named_parameters(remove_duplicate=False),
            *self._model.named_buffers(remove_duplicate=False),
        ]
        tensor = next(each for name, each in everything if name == names[0])
        return tuple(name for name, each in everything if each is tensor)


class _Stage(nn.Module):
    """Some modules of a model, under their names in it, and the part of its forward pass that calls them."""

    def __init__(self, model: nn.Module, graph: fx.Graph, used: Iterable[str], loss: Loss | None) -> None:
        super().__init__()
        memo: dict[int, Any] = {}
        for name in used:
            _place(self, name, copy.deepcopy(_attribute(model, name), memo))
        self.training = model.training
        self._loss = loss
        code = fx.GraphModule(self, graph)
        self._run = type(code).forward  # the generated code, with this module as self
        graph.owning_module = None  # else the modules that were built last live as long as what builds them

    def forward(self, carry: Any, microbatch: Any) -> Any:
        values = () if carry is None else (carry,) if isinstance(carry, Tensor) else carry
        returned = self._run(self, microbatch, *values)
        return returned if self._loss is None else self._loss(returned, microbatch)


class _Tracer(fx.Tracer):
    """Looks into those modules only that contain one at which the model is cut."""

    def __init__(self, cuts: Sequence[str], method: str) -> None:
        super().__init__()
        self._cuts = cuts
        self.traced_func_name = method

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        name = module_qualified_name
        return bool(name) and not any(cut.startswith(f"{name}.") for cut in self._cuts)


def _parts(graph: fx.Graph, cuts: Sequence[str]) -> list[list[fx.Node]]:
    """The nodes of each stage."""
    parts: list[list[fx.Node]] = [[]]
    left = list(cuts)
    for node in graph.nodes:
        if node.op == "call_module" and left and node.target == left[0]:
            parts.append([])
            left.pop(0)
        if node.op not in ("placeholder", "output"):
            parts[-1].append(node)
    if left:
        raise UsageError(
            f"psa.split: the forward pass does not call {left[0]!r} after those before it: name modules in the order "
            "in which they are called, once each"
        )
    if not all(parts):
        raise UsageError(f"psa.split: nothing is computed before {cuts[0]!r}: begin with a later module")
    return parts


def _crossing(parts: Sequence[Sequence[fx.Node]], before: int) -> list[fx.Node]:
    """What is computed up to this stage and needed after it, in the order in which it was computed."""
    done = [node for part in parts[: before + 1] for node in part]
    later = {node for part in parts[before + 1 :] for node in part}
    return [node for node in done if any(user in later or user.op == "output" for user in node.users)]


def _stage_graph(graph: fx.Graph, parts: Sequence[Sequence[fx.Node]], index: int) -> fx.Graph:
    """The part of the pass as a graph of its own: of the micro-batch and what comes, to what goes on."""
    part = fx.Graph()
    taken: dict[fx.Node, fx.Node] = {}
    batch = part.placeholder("microbatch")
    for node in graph.nodes:
        if node.op == "placeholder":
            taken[node] = batch
            break
    for number, node in enumerate(_crossing(parts, index - 1) if index else []):
        taken[node] = part.placeholder(f"carry_{number}")
    for node in parts[index]:
        taken[node] = part.node_copy(node, lambda each: taken[each])
    if index < len(parts) - 1:
        part.output(tuple(taken[node] for node in _crossing(parts, index)))
    else:
        (output,) = (node for node in graph.nodes if node.op == "output")
        part.output(fx.node.map_arg(output.args[0], lambda each: taken[each]))
    part.lint()
    return part


def _attribute(model: nn.Module, name: str) -> Any:
    path, _, last = name.rpartition(".")
    return getattr(model.get_submodule(path), last)


def _place(root: nn.Module, name: str, value: Any) -> None:
    """Let a module have a part under a name with dots, with modules on the way that hold it only."""
    *path, last = name.split(".")
    for step in path:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
        root.register_buffer(last, value)
    else:
        setattr(root, last, value)
