"""Rank state: what is kept, there and back as bytes, when a push brings it; and which rank is helped by which."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from psa_store import optim
from psa_store.compression import parse_compression
from psa_store.consistency import push_brings_rank_state
from psa_store.consistency.worker_step import rank_to_help
from psa_store.errors import Refused
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.mode import parse_mode
from psa_store.optim.rank_state import LOCAL, RESIDUAL, START, rank_state_of
from psa_store.optim.tensors import to_torch
from psa_store.worker.rank_state import RankMemory

LAYOUT = make_layout(
    [
        TensorSpec(("w",), (50, 30), "float32", TensorRole.TRAINED),
        TensorSpec(("h",), (40,), "bfloat16", TensorRole.TRAINED),
        TensorSpec(("b",), (3,), "float32", TensorRole.BUFFER),
    ],
    4096,
)
MOMENTS = ["exp_avg", "exp_avg_sq"]
ADAMW = optim.AdamW(lr=0.1).to_dict()


def config(mode: str, compress: str = "none") -> JobConfig:
    return JobConfig(
        name="j",
        ranks=2,
        seed=0,
        optimizer=ADAMW,
        layout=LAYOUT.fingerprint,
        mode=parse_mode(mode),
        compression=parse_compression(compress),
    )


@pytest.mark.parametrize(
    ("mode", "compress", "wide", "narrow"),
    [
        ("sync", "none", None, None),
        ("sync", "topk:0.1", [RESIDUAL], None),
        ("async", "topk:0.1", None, None),
        ("local:steps=2,forget", "topk:0.1", None, None),
        ("local:steps=2", "none", MOMENTS, MOMENTS),
        ("local:steps=2,overlap", "none", [*MOMENTS, START, LOCAL], [*MOMENTS, START, LOCAL]),
        ("local:steps=2", "topk:0.1", [*MOMENTS, RESIDUAL], MOMENTS),
    ],
)
def test_what_is_kept(mode: str, compress: str, wide: list[str] | None, narrow: list[str] | None) -> None:
    job = config(mode, compress)
    kept = {shard.dtype: rank_state_of(job, shard) for shard in LAYOUT.shards_of(TensorRole.TRAINED)}
    for dtype, names in (("float32", wide), ("bfloat16", narrow)):
        state = kept[dtype]
        assert (None if state is None else [name for name, _ in state.parts]) == names
    assert all(rank_state_of(job, shard) is None for shard in LAYOUT.shards_of(TensorRole.BUFFER))


@pytest.mark.parametrize("compress", ["none", "int8", "topk:0.1"])
@pytest.mark.parametrize("mode", ["local:steps=2", "local:steps=2,fragments=2"])
def test_what_was_packed_is_what_both_go_on_with(mode: str, compress: str) -> None:
    draw = torch.Generator().manual_seed(5)
    for shard in LAYOUT.shards_of(TensorRole.TRAINED):
        state = rank_state_of(config(mode, compress), shard)
        assert state is not None
        names = [name for name, _ in state.parts]
        here = RankMemory({shard.index: {name: torch.randn(shard.numel, generator=draw) for name in names}})
        there = RankMemory({shard.index: {name: torch.zeros(shard.numel) for name in names}})
        before = {name: here.parts[shard.index][name].clone() for name in names}
        here.updates = 41
        payload = here.pack(shard, state)
        assert len(payload) == state.size_bytes
        there.unpack(shard, state, payload.numpy().data)
        assert there.updates == 41
        for name, dtype in state.parts:
            assert torch.equal(here.parts[shard.index][name], there.parts[shard.index][name])
            assert torch.equal(here.parts[shard.index][name], before[name].to(to_torch(dtype)).float())
        with pytest.raises(Refused):
            there.unpack(shard, state, payload.numpy().data[:-1])


@pytest.mark.parametrize(
    ("mode", "compress", "versions"),
    [
        ("sync", "none", []),
        ("sync", "topk:0.1", [50, 100, 110]),
        ("async", "topk:0.1", []),
        ("local:steps=2", "none", [50, 100, 110]),
        ("local:steps=2,fragments=2", "none", [50, 100]),
        ("local:steps=2,forget", "none", []),
    ],
)
def test_a_push_brings_it_with_commits_and_at_the_end_if_every_shard_is_pushed(
    mode: str, compress: str, versions: list[int]
) -> None:
    job = config(mode, compress)
    assert [version for version in range(1, 111) if push_brings_rank_state(job, version, 110)] == versions


@given(st.lists(st.integers(4, 6), min_size=1, max_size=6), st.data())
def test_each_missing_rank_has_one_helper_if_any_can_help(clocks: list[int], data: st.DataObject) -> None:
    ranks, version = len(clocks), 4
    holder = data.draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    missing = [rank for rank in range(ranks) if clocks[rank] <= version]
    helped: dict[int, list[int]] = {}
    for worker in range(3):
        holding = [rank for rank in range(ranks) if holder[rank] == worker]
        done: set[int] = set()
        while (rank := rank_to_help(clocks, version, holding, done)) is not None:
            assert rank in missing and rank not in done
            done.add(rank)
            helped.setdefault(rank, []).append(worker)
    assert all(len(workers) == 1 for workers in helped.values())
    assert set(helped) == (set() if len(missing) == ranks else set(missing))
