"""A model in stages: of each, a module while this worker holds one of its cells, and nothing otherwise.

Used by the worker, in the thread that runs the model.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from psa_store import logs
from psa_store.errors import Refused, UsageError
from psa_store.job.layout import Layout, Shard, TensorRole, TensorSpec
from psa_store.job.sampling import stream_seed
from psa_store.job.wire_layout import WireLayout
from psa_store.worker.flat_model import FlatModel, describe_model
from psa_store.worker.host_memory import give_back, must_suffice
from psa_store.worker.randomness import seed_all
from psa_store.worker.script import check_model
from psa_store.worker.staged_state import StagedScriptState
from psa_store.worker.state import BUFFER

BuildStage = Callable[[], nn.Module]


@runtime_checkable
class NamesTied(Protocol):
    """What builds a stage of a model that exists, and knows the names that its parameters have elsewhere in it."""

    def all_names(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """All names of the parameter that has these in the stage, in the order of the whole model."""


GroupOf = Callable[[str, tuple[int, ...]], int]


def describe_stages(
    stages: Sequence[BuildStage], seed: int, group_of: GroupOf, state: StagedScriptState | None = None
) -> list[TensorSpec]:
    """List the parameters and buffers of all stages, without their memory: each is built on torch's meta device,
    if that can be.

    A name that two stages have is one parameter, tied. The state of the script is a buffer of all, of the last first.

    Raises:
        UsageError: a stage is no module, or two have different tensors, or buffers, of one name.
    """
    specs: list[TensorSpec] = []
    places: dict[str, int] = {}
    for stage, build in enumerate(stages):
        module = _build_without_memory(build, stage, seed, state)
        for spec in describe_model(module, group_of):
            is_state = spec.name == BUFFER and state is not None
            names = spec.names if is_state else _all_names(build, spec.names)
            place = next((places[name] for name in names if name in places), len(specs))
            places.update(dict.fromkeys(names, place))
            if place == len(specs):
                specs.append(replace(spec, names=names, stages=(stage,)))
                continue
            other = specs[place]
            if is_state:
                specs[place] = replace(other, stages=(stage, *other.stages))
                continue
            form = other.shape, other.dtype, other.role
            if spec.role is TensorRole.BUFFER or (spec.shape, spec.dtype, spec.role) != form:
                raise UsageError(
                    f"stages {other.home} and {stage} both have a {names[0]}, which would be one tensor: only "
                    "parameters of one shape and dtype can be, trained or frozen in both. Give it another name in one"
                )
            specs[place] = replace(
                other, names=tuple(dict.fromkeys(other.names + names)), stages=(*other.stages, stage)
            )
    return specs


def _all_names(build: BuildStage, names: tuple[str, ...]) -> tuple[str, ...]:
    return build.all_names(names) if isinstance(build, NamesTied) else names


def _build_without_memory(build: BuildStage, stage: int, seed: int, state: StagedScriptState | None) -> nn.Module:
    """Build a stage to see what it has; in memory if it looks at values of its tensors, which have none there."""
    try:
        with torch.device("meta"):
            return _build(build, stage, seed, state)
    except (RuntimeError, NotImplementedError):
        return _build(build, stage, seed, state)


def refuse_with_stages(**given: object) -> None:
    """Raise UsageError for an argument of ``psa.Worker`` that goes with a whole model only."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"psa.Worker({name}=) does not go with stages: it belongs to a model that is in one piece")


def _build(build: BuildStage, stage: int, seed: int, state: StagedScriptState | None) -> nn.Module:
    """Build a stage: equal in all processes, and each time."""
    seed_all(stream_seed(seed, 0, 0, f"stage {stage}"))
    module = build()
    check_model(module)
    if state is not None:
        state.attach(module)
    return module


class StagedModel:
    """The stages that are held, each in flat memory. ``resident_max``: how many that can be at once; None: all."""

    def __init__(
        self,
        stages: Sequence[BuildStage],
        layout: Layout,
        seed: int,
        state: StagedScriptState | None = None,
        resident_max: int | None = None,
    ) -> None:
        self.resident_max = resident_max
        self.state = state
        if state is not None:
            state.lies_in(layout)
        self._builders = stages
        self._layout = layout
        self._seed = seed
        self._wire: WireLayout | None = None
        self._held: dict[int, tuple[nn.Module, FlatModel]] = {}
        self._shown: dict[str, int] = {}
        """By server of this host, a descriptor of the memory in which it publishes parameters ..."""
        self._shown_in: dict[int, set[str]] = {}
        """... and by stage, which of them it shows."""
        self._filling: frozenset[int] = frozenset()
        """The stages to which parameters come."""
        self._graph_checked: set[int] = set()
        self._came_tied: set[int] = set()
        """Shards of several stages that have come by value to the first of them."""
        self._log = logs.get_logger()

    def close(self) -> None:
        """Let the stages go; script that has kept a module finds its parameters as they are."""
        self._close_shown()
        for _, flat in self._held.values():
            flat.close()
        self._held.clear()

    def initial(self) -> Iterator[tuple[Shard, memoryview]]:
        """Each shard and its bytes, as the job begins with them: stage after stage is built for it, and goes."""
        for stage in range(len(self._builders)):
            module, flat = self._build(stage)
            for shard, data in flat.initial():
                copied = memoryview(bytearray(data))  # what is kept until it is written must not keep the whole stage
                del data
                yield shard, copied
                del copied
            flat.close()
            gone = weakref.ref(module)
            del module, flat
            give_back(gone)

    # --- what is held

    @property
    def stages(self) -> tuple[int, ...]:
        return tuple(sorted(self._held))

    @property
    def modules(self) -> dict[int, nn.Module]:
        """By stage, its module."""
        return {stage: self._held[stage][0] for stage in self.stages}

    @property
    def held(self) -> list[FlatModel]:
        """The memory of each."""
        return [self._held[stage][1] for stage in self.stages]

    def hold(self, stages: Iterable[int]) -> tuple[int, ...]:
        """Have these stages and no others; returns the new ones, whose parameters are undefined."""
        wanted = set(stages)
        for stage in self._held.keys() - wanted:
            module, flat = self._held.pop(stage)
            self._shown_in.pop(stage, None)
            self._graph_checked.discard(stage)
            flat.close()
            gone = weakref.ref(module)
            del module, flat
            give_back(gone)
        new = tuple(sorted(wanted - self._held.keys()))
        for stage in new:
            module, flat = self._build(stage)
            if self._wire is not None:
                flat.receive_as(self._wire)
            self._held[stage] = module, flat
            self._shown_in[stage] = set()
        if new:
            self._log.debug("holding stages", stages=sorted(wanted))
        return new

    def bytes_of(self, stages: Iterable[int]) -> int:
        """Of the parameters and buffers of some stages."""
        wanted = frozenset(stages)
        return sum(shard.size_bytes for shard in self._layout.shards if not wanted.isdisjoint(shard.stages))

    def _build(self, stage: int) -> tuple[nn.Module, FlatModel]:
        """A stage in flat memory, with the values that it has in the beginning."""
        with must_suffice(f"build stage {stage} of {len(self._builders)}", self.bytes_of([stage])):
            module = _build(self._builders[stage], stage, self._seed, self.state)
            flat = FlatModel(module, self._layout, push_early=False, stage=stage)
        give_back()  # the tensors with which it was built
        return module, flat

    def check_graph(self, stage: int, carry: Iterable[Tensor | None], returned: Iterable[Tensor]) -> None:
        """Refuse, once for each module, what a stage returns if it was made of something that did not come to it.

        Raises:
            UsageError: gradients would go to a tensor that is neither a parameter of the stage nor in its carry.
        """
        if stage in self._graph_checked:
            return
        self._graph_checked.add(stage)
        module = self.module(stage)
        own = {id(each) for each in (*module.parameters(), *carry)}
        seen: set[Any] = set()
        left = [each.grad_fn for each in returned]
        while left:
            node: Any = left.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) not in own:
                raise UsageError(
                    f"stage {stage} computed with a tensor of shape {tuple(variable.shape)} that is neither a "
                    "parameter of it nor came from the stage before: what crosses a cut has to be returned by the one "
                    "and taken from carry by the other, or other workers compute something else"
                )
            left += [following for following, _ in node.next_functions]

    def module(self, stage: int) -> nn.Module:
        """The module of a stage that is held."""
        return self._held[stage][0]

    def flat(self, stage: int) -> FlatModel:
        """The memory of a stage that is held."""
        return self._held[stage][1]

    def end(self, weight: float) -> None:
        """Refuse a weight of the script: that of a rank comes with its loss."""
        if weight != 1.0:
            raise UsageError(
                f"worker.step(weight={weight}) with stages: the last one returns the weight, as (loss, weight)"
            )

    # --- parameters that come

    def receive_as(self, wire: WireLayout) -> None:
        """Parameters come as ``wire`` lays them out."""
        self._wire = wire

    def fill(self, stages: Iterable[int]) -> None:
        """Parameters are about to come to these stages, and to no other."""
        self._filling = frozenset(stages)

    def place(self, shard: Shard) -> memoryview:
        """Where a shard that comes by value is to be received."""
        first, *others = sorted(self._filling.intersection(shard.stages)) or [-1]
        if first not in self._held:
            raise Refused(f"PARAMS of shard {shard.index}, of stages {shard.stages}, which this worker did not ask for")
        if others:
            self._came_tied.add(shard.index)
        return self._held[first][1].place(shard)

    def publishes(self, server: str, descriptor: int) -> None:
        """A server of this host publishes its parameters in this memory from now on; takes over the descriptor."""
        former = self._shown.pop(server, None)
        if former is not None:
            os.close(former)
        self._shown[server] = descriptor
        for shown in self._shown_in.values():
            shown.discard(server)

    def show(self, server: str, shards: Iterable[int]) -> None:
        """Let the stages have these trained shards where the server publishes them, if it does."""
        if server not in self._shown:
            return
        for stage, (_, flat) in self._held.items():
            own = [shard for shard in shards if stage in self._layout.shards[shard].stages]
            if own and server not in self._shown_in[stage]:
                flat.show(server, os.dup(self._shown[server]), own)
                self._shown_in[stage].add(server)

    def hide(self) -> None:
        """Own memory for everything again, with undefined contents: parameters are about to be received."""
        self._close_shown()
        for _, flat in self._held.values():
            flat.hide()

    def version_arrived(self) -> None:
        """All shards of the stages that were filled are at one version; raises UsageError as ``FlatModel`` does."""
        for shard in (self._layout.shards[index] for index in self._came_tied):
            first, *others = sorted(self._filling.intersection(shard.stages))
            for other in others:
                self.flat(other).place(shard)[:] = self.flat(first).place(shard)
        self._came_tied.clear()
        for stage in self._filling:
            self.flat(stage).version_arrived()
        if self.state is not None and self._filling:
            flat = self.flat(min(self._filling))
            for index in self.state.shards:
                self.state.arrived(index, flat.parameters(self._layout.shards[index]))

    def _close_shown(self) -> None:
        for descriptor in self._shown.values():
            os.close(descriptor)
        self._shown.clear()
        for shown in self._shown_in.values():
            shown.clear()
