"""The layout: every element of every tensor has exactly one place, and every process finds the same one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.dtypes import ITEM_BYTES, TRAINABLE_DTYPES
from psa_store.job.layout import (
    PAGE_BYTES,
    SHARD_BYTES_MAX,
    SHARD_BYTES_MIN,
    SHARDS_AIM,
    TENSOR_ALIGN_BYTES,
    Layout,
    TensorRole,
    TensorSpec,
    default_shard_bytes,
    describe_difference,
    layout_from_json,
    make_layout,
)


def tensor(
    name: str,
    *shape: int,
    dtype: str = "float32",
    role: TensorRole = TensorRole.TRAINED,
    group: int = 0,
    stage: int = 0,
) -> TensorSpec:
    return TensorSpec((name,), shape, dtype, role, group, stages=(stage,))


@st.composite
def models(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors of all roles, dtypes and stages, empty, tiny, or larger than several shards, some of them tied."""
    specs = []
    stages = draw(st.integers(1, 3))
    for i in range(draw(st.integers(1, 12))):
        role = draw(st.sampled_from(TensorRole))
        dtype = draw(st.sampled_from(sorted(TRAINABLE_DTYPES if role is TensorRole.TRAINED else ITEM_BYTES)))
        shape = draw(st.sampled_from([(), (0,), (3, 0), (1,), (7, 3), (16,), (1023,), (64, 33), (9000,)]))
        names = (f"t{i}", f"tied.t{i}") if draw(st.booleans()) else (f"t{i}",)
        group = draw(st.integers(0, 2)) if role is TensorRole.TRAINED else 0
        specs.append(TensorSpec(names, shape, dtype, role, group, stages=(draw(st.integers(0, stages - 1)),)))
    return specs


shard_sizes = st.sampled_from([PAGE_BYTES, 3 * PAGE_BYTES, 1 << 20])


@given(models(), shard_sizes)
def test_pieces_tile_every_tensor_exactly_once(model: list[TensorSpec], shard_bytes: int) -> None:
    layout = make_layout(model, shard_bytes)
    covered = [0] * len(model)
    for shard in layout.shards:
        for piece in shard.pieces:
            assert piece.length > 0
            assert piece.tensor_start == covered[piece.tensor]
            covered[piece.tensor] += piece.length
    assert covered == [spec.numel for spec in model]


@given(models(), shard_sizes)
def test_a_piece_lies_where_its_tensor_lies(model: list[TensorSpec], shard_bytes: int) -> None:
    layout = make_layout(model, shard_bytes)
    for shard in layout.shards:
        item = ITEM_BYTES[shard.dtype]
        free = 0
        for piece in shard.pieces:
            spec = model[piece.tensor]
            assert (spec.role, spec.dtype, spec.stages) == (shard.role, shard.dtype, shard.stages)
            assert shard.offset_bytes + piece.shard_start * item == (
                layout.offsets_bytes[piece.tensor] + piece.tensor_start * item
            )
            assert piece.shard_start >= free, "pieces are in order and do not overlap"
            free = piece.shard_start + piece.length
        assert free <= shard.numel


@given(models(), shard_sizes)
def test_shards_tile_their_segments(model: list[TensorSpec], shard_bytes: int) -> None:
    layout = make_layout(model, shard_bytes)
    assert [shard.index for shard in layout.shards] == list(range(len(layout.shards)))
    end = 0
    for previous, shard in zip((None, *layout.shards), layout.shards, strict=False):
        segment = shard.role, shard.dtype, shard.stages
        same_segment = previous and (previous.role, previous.dtype, previous.stages) == segment
        if same_segment:
            assert previous is not None
            assert previous.size_bytes == shard_bytes, "only the last shard of a segment may be shorter"
            assert shard.offset_bytes == end
        else:
            assert 0 <= shard.offset_bytes - end < PAGE_BYTES
        assert 0 < shard.size_bytes <= shard_bytes
        end = shard.offset_bytes + shard.size_bytes
    assert 0 <= layout.arena_bytes - end < PAGE_BYTES, "a segment of empty tensors may start on the next page"


@given(models(), shard_sizes)
def test_tensors_and_shards_are_aligned(model: list[TensorSpec], shard_bytes: int) -> None:
    layout = make_layout(model, shard_bytes)
    assert all(offset % TENSOR_ALIGN_BYTES == 0 for offset in layout.offsets_bytes)
    for shard in layout.shards:
        assert shard.offset_bytes % PAGE_BYTES == 0
        assert shard.size_bytes % TENSOR_ALIGN_BYTES == 0
        assert shard.pieces[0].shard_start == 0, "no shard starts with padding; optimizer kernels rely on it"


@given(models(), shard_sizes)
def test_padding_is_shorter_than_the_alignment(model: list[TensorSpec], shard_bytes: int) -> None:
    for shard in make_layout(model, shard_bytes).shards:
        starts = [piece.shard_start for piece in shard.pieces[1:]] + [shard.numel]
        for piece, next_start in zip(shard.pieces, starts, strict=True):
            gap = next_start - (piece.shard_start + piece.length)
            assert 0 <= gap * ITEM_BYTES[shard.dtype] < TENSOR_ALIGN_BYTES


@given(models(), st.none() | shard_sizes)
def test_json_gives_back_the_same_layout(model: list[TensorSpec], shard_bytes: int | None) -> None:
    layout = make_layout(model, shard_bytes)
    assert layout_from_json(layout.to_json()) == layout


@given(models(), shard_sizes)
def test_equal_inputs_give_equal_layouts(model: list[TensorSpec], shard_bytes: int) -> None:
    again = [TensorSpec(**asdict(spec)) for spec in model]
    assert make_layout(iter(again), shard_bytes) == make_layout(model, shard_bytes)


BASE = (tensor("a", 5000), tensor("b", 3, 4), tensor("c", 8, role=TensorRole.BUFFER, dtype="int64"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"names": ("x",)}, "'b' is in this model"),
        ({"names": ("b", "tied")}, "has names"),
        ({"shape": (4, 3)}, "has shape (3, 4)"),
        ({"dtype": "bfloat16"}, "has dtype"),
        ({"role": TensorRole.FROZEN}, "has role"),
        ({"group": 1}, "has group 0"),
        ({"persistent": False}, "has persistent True"),
        ({"stages": (1,)}, "has stages (0,)"),
    ],
)
def test_the_fingerprint_changes_with_every_property_of_a_tensor(change: dict[str, object], words: str) -> None:
    base = make_layout(BASE, PAGE_BYTES)
    changed = make_layout([BASE[0], replace(BASE[1], **change), BASE[2]], PAGE_BYTES)  # type: ignore[arg-type]
    assert changed.fingerprint != base.fingerprint
    assert words in describe_difference(base, changed)


def test_the_fingerprint_changes_with_the_shard_size_the_order_and_the_number_of_tensors() -> None:
    base = make_layout(BASE, PAGE_BYTES)
    larger = make_layout(BASE, 2 * PAGE_BYTES)
    reordered = make_layout([BASE[1], BASE[0], BASE[2]], PAGE_BYTES)
    fewer = make_layout(BASE[:2], PAGE_BYTES)
    assert len({layout.fingerprint for layout in (base, larger, reordered, fewer)}) == 4
    assert describe_difference(base, larger) == "shard_bytes is 4096 here and 8192 in the job"
    assert describe_difference(base, reordered) == "the tensors come in another order"
    assert "'c' is in this model but not in the job" in describe_difference(base, fewer)
    assert "'c' is in the job but not in this model" in describe_difference(fewer, base)


def test_the_fingerprint_does_not_change_between_releases() -> None:
    """Golden values: stored jobs compare with them. A change of the layout is a change of the format."""
    layout = make_layout(BASE, PAGE_BYTES)
    assert layout.fingerprint == "8dc8e0a09326e33b418a6eb48390b65c30899464d4f86b0aefd51d63df0258dc"
    assert layout.to_json() == (
        '{"format":1,"shard_bytes":4096,"tensors":['
        '{"names":["a"],"shape":[5000],"dtype":"float32","role":"trained","group":0,"persistent":true},'
        '{"names":["b"],"shape":[3,4],"dtype":"float32","role":"trained","group":0,"persistent":true},'
        '{"names":["c"],"shape":[8],"dtype":"int64","role":"buffer","group":0,"persistent":true}]}'
    )


@given(models(), shard_sizes)
def test_a_worker_finds_all_of_its_stages_in_shards_of_these_alone(model: list[TensorSpec], shard_bytes: int) -> None:
    layout = make_layout(model, shard_bytes)
    for stage in range(3):
        tensors = {index for index, spec in enumerate(model) if spec.home == stage and spec.numel}
        pieces = [piece.tensor for shard in layout.shards if shard.home == stage for piece in shard.pieces]
        assert set(pieces) == tensors


@given(models(), shard_sizes)
def test_segments_of_one_dtype_are_neighbours_whatever_their_stages(model: list[TensorSpec], shard_bytes: int) -> None:
    """Rounded tensors lie in half the place of all of them."""
    kinds = [(shard.role, shard.dtype) for shard in make_layout(model, shard_bytes).shards]
    assert len(list(groupby(kinds))) == len(set(kinds))


def test_a_stage_is_written_only_where_it_is_not_the_first() -> None:
    layout = make_layout([tensor("front", 4), tensor("back", 4, stage=1)])
    assert [spec.get("stages") for spec in json.loads(layout.to_json())["tensors"]] == [None, [1]]
    assert [shard.home for shard in layout_from_json(layout.to_json()).shards] == [0, 1]


def test_one_tensor_spans_shards() -> None:
    layout = make_layout([tensor("small", 10), tensor("large", 2500)], PAGE_BYTES)
    assert [[(p.tensor, p.tensor_start, p.shard_start, p.length) for p in s.pieces] for s in layout.shards] == [
        [(0, 0, 0, 10), (1, 0, 16, 1008)],
        [(1, 1008, 0, 1024)],
        [(1, 2032, 0, 468)],
    ]
    assert [shard.size_bytes for shard in layout.shards] == [4096, 4096, 1920]
    assert [layout.tensor_at(layout.shards[0], i) for i in (9, 10, 16)] == [
        "small",
        "padding of shard 0",
        "large",
    ]


def test_roles_and_dtypes_get_segments_of_their_own_in_a_fixed_order() -> None:
    layout = make_layout(
        [
            tensor("frozen", 4, role=TensorRole.FROZEN),
            tensor("half", 4, dtype="bfloat16"),
            tensor("count", dtype="int64", role=TensorRole.BUFFER),
            tensor("weight", 4),
            tensor("half2", 4, dtype="bfloat16"),
        ]
    )
    assert [(s.role, s.dtype, [p.tensor for p in s.pieces]) for s in layout.shards] == [
        (TensorRole.TRAINED, "bfloat16", [1, 4]),
        (TensorRole.TRAINED, "float32", [3]),
        (TensorRole.BUFFER, "int64", [2]),
        (TensorRole.FROZEN, "float32", [0]),
    ]
    assert [s.index for s in layout.versioned] == [0, 1, 2]


def test_a_tensor_without_elements_has_a_place_but_no_piece() -> None:
    layout = make_layout([tensor("empty", 0), tensor("full", 3), tensor("empty2", 2, 0)])
    assert [[piece.tensor for piece in shard.pieces] for shard in layout.shards] == [[1]]
    assert make_layout([tensor("empty", 0)]).shards == ()


@given(st.integers(0, 1 << 45))
def test_default_shard_sizes_are_powers_of_two_within_limits(total_bytes: int) -> None:
    size = default_shard_bytes(total_bytes)
    assert size.bit_count() == 1
    assert SHARD_BYTES_MIN <= size <= SHARD_BYTES_MAX
    if SHARD_BYTES_MIN < size < SHARD_BYTES_MAX:
        assert SHARDS_AIM / 2 < total_bytes / size <= SHARDS_AIM + 1


def test_the_default_shard_size_follows_the_total_size() -> None:
    assert make_layout([tensor("w", 1000)]).shard_bytes == SHARD_BYTES_MIN
    assert make_layout([tensor("w", 256 << 18)]).shard_bytes == 4 << 20


@pytest.mark.parametrize(
    ("model", "shard_bytes", "words"),
    [
        ([], None, "no parameters"),
        ([tensor("a", 1), tensor("a", 2)], None, "'a'"),
        ([TensorSpec(("a", "b"), (1,), "float32", TensorRole.TRAINED), tensor("b", 1)], None, "'b'"),
        ([tensor("a", 1, dtype="complex64")], None, "complex64"),
        ([tensor("a", 1, dtype="int64")], None, "cannot be trained"),
        ([tensor("a", 1)], 0, "shard_bytes=0"),
        ([tensor("a", 1)], -4096, "shard_bytes=-4096"),
        ([tensor("a", 1)], 5000, "shard_bytes=5000"),
    ],
)
def test_unusable_models_are_refused(model: list[TensorSpec], shard_bytes: int | None, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_layout(model, shard_bytes)


def _without(layout: Layout, key: str) -> str:
    document = json.loads(layout.to_json())
    del document[key]
    return json.dumps(document)


def test_damaged_json_is_told_apart_from_wrong_use() -> None:
    layout = make_layout(BASE)
    text = layout.to_json()
    for damaged in (
        "",
        "{",
        "[]",
        _without(layout, "tensors"),
        text.replace("trained", "strained"),
        text.replace("float32", "float31"),
        text.replace('"shard_bytes":', '"shard_bytes":1'),
    ):
        with pytest.raises(DataIntegrity):
            layout_from_json(damaged)
