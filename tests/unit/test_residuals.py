"""What compression holds back belongs to a cell and a version: whatever is made again begins with the same."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from psa_store import optim
from psa_store.cluster import Cell
from psa_store.compression import parse_compression
from psa_store.job.config import JobConfig
from psa_store.job.layout import Shard, TensorRole, TensorSpec, make_layout
from psa_store.optim.rank_state import rank_state_of
from psa_store.optim.tensors import as_bytes
from psa_store.wire import Header, Kind
from psa_store.worker.batches import RankStep
from psa_store.worker.rank_state import RankMemory
from psa_store.worker.residuals import Residuals
from psa_store.worker.server_connections import Answer
from psa_store.worker.session import PlanSession, Tools

LAYOUT = make_layout(
    [TensorSpec((f"w{stage}",), (64,), "float32", TensorRole.TRAINED, stages=(stage,)) for stage in range(3)]
    + [TensorSpec(("tied",), (64,), "float32", TensorRole.TRAINED, stages=(0, 2))],
    4096,
)
SHARD = {shard.stages: shard for shard in LAYOUT.shards}


class Scene:
    """A worker with some cells; servers keep 1, 2, 3 … of shard 0, 1, 2 …, ten times as much of rank 1."""

    def __init__(self, compress: str, *cells: Cell) -> None:
        self.config = JobConfig(
            "job",
            2,
            0,
            optim.SGD(0.1).to_dict(),
            LAYOUT.fingerprint,
            commit_every=4,
            compression=parse_compression(compress),
            stages=3,
        )
        self.asked: list[tuple[int, int]] = []
        servers = SimpleNamespace(pull_state=lambda shard, version, rank: self.asked.append((rank, shard)))
        tools = SimpleNamespace(config=self.config, layout=LAYOUT, servers=servers)
        ranks = tuple(dict.fromkeys(cell.rank for cell in cells))
        session = SimpleNamespace(
            cells=cells, held=ranks, last_version=None, ask=self._answered, term_is_over=lambda: False
        )
        self.residuals = Residuals(cast(Tools, tools), cast(PlanSession, session))

    def _answered(
        self, send: Callable[[], None], done: Callable[[], bool], over: Callable[[], bool], what: Callable[[], str]
    ) -> bool:
        send()
        for rank, index in self.asked:
            shard = LAYOUT.shards[index]
            state = rank_state_of(self.config, shard)
            assert state is not None
            memory = RankMemory({index: {"residual": torch.full((shard.numel,), (index + 1) * 10.0**rank)}})
            payload = memory.pack(shard, state)
            header = Header(Kind.STATE, step=4, rank=rank, shard=index, length=len(payload))
            self.residuals.take(Answer(header, "server", payload=as_bytes(payload)))
        assert done()
        return True

    def held_back(self, rank: int, *stages: int) -> float:
        place = self.place(rank, SHARD[stages])
        assert len(place.unique()) == 1
        return float(place[0])

    def place(self, rank: int, shard: Shard) -> Tensor:
        place = self.residuals.of(rank, shard)
        assert place is not None
        return place


@pytest.fixture
def scene() -> Scene:
    scene = Scene("topk:0.1", Cell(0, 0), Cell(1, 0), Cell(1, 1))
    assert scene.residuals.load(term=1, version=4)
    scene.residuals.shown(4)
    return scene


def test_only_that_of_held_cells_is_asked_for_a_tied_one_with_its_first_stage(scene: Scene) -> None:
    tied, first, second = (SHARD[stages].index for stages in ((0, 2), (0,), (1,)))
    assert sorted(scene.asked) == sorted([(0, tied), (0, first), (1, tied), (1, first), (1, second)])
    assert scene.held_back(0, 0) == first + 1
    assert scene.held_back(1, 1) == 10.0 * (second + 1)


def test_a_step_that_is_made_again_begins_with_the_same_until_its_version_is_here(scene: Scene) -> None:
    before = scene.held_back(1, 0, 2)
    scene.place(1, SHARD[0, 2]).fill_(-1.0)
    assert scene.held_back(1, 0, 2) == before
    scene.place(1, SHARD[0, 2]).fill_(-1.0)
    assert scene.residuals.load(term=1, version=4) and scene.held_back(1, 0, 2) == before, "connected anew"
    scene.place(1, SHARD[0, 2]).fill_(-1.0)
    scene.residuals.shown(5)
    assert scene.held_back(1, 0, 2) == -1.0
    scene.residuals.shown(5)
    assert scene.held_back(1, 0, 2) == -1.0, "shown a second time"


def test_a_new_term_begins_with_what_servers_keep_also_where_its_version_is_the_next_one(scene: Scene) -> None:
    before = scene.held_back(0, 0)
    scene.place(0, SHARD[0,]).fill_(-1.0)
    assert scene.residuals.load(term=2, version=5)
    scene.residuals.shown(5)
    assert scene.held_back(0, 0) == before


def test_a_push_brings_that_of_its_cell_with_the_versions_that_are_committed(scene: Scene) -> None:
    assert not scene.residuals.state_of(RankStep(6, 0))
    due = scene.residuals.state_of(RankStep(7, 0))
    assert due.keys() == {SHARD[0, 2].index, SHARD[0,].index}
    scene.place(0, SHARD[0,]).fill_(5.0)
    packed = due[SHARD[0,].index]()
    assert packed[:-8].view(torch.float32).unique().tolist() == [5.0]


def test_where_nothing_is_held_back_nothing_is_asked() -> None:
    scene = Scene("int8", Cell(0, 0))
    assert scene.residuals.load(term=1, version=4)
    scene.residuals.shown(5)
    assert not scene.asked and scene.residuals.of(0, LAYOUT.shards[0]) is None
    assert not scene.residuals.state_of(RankStep(7, 0))
