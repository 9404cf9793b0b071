"""Places of rounded tensors: inside the memory, apart from each other, and the arena's own where nothing is rounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from psa_store.compression import Compression, Form
from psa_store.job.layout import PAGE_BYTES, TensorRole, TensorSpec, make_layout
from psa_store.job.wire_layout import WireLayout

specs = st.builds(
    lambda shape, dtype, role, stage: (shape, dtype, role, stage),
    st.lists(st.integers(1, 40), max_size=3).map(tuple),
    st.sampled_from(["float32", "bfloat16", "float64"]),
    st.sampled_from(TensorRole),
    st.integers(0, 2),
)


@given(st.lists(specs, min_size=1, max_size=12), st.sampled_from(Form))
def test_no_two_shards_share_a_byte_and_tensors_lie_inside_their_shards(
    drawn: list[tuple[tuple[int, ...], str, TensorRole, int]], form: Form
) -> None:
    tensors = [
        TensorSpec((f"t{i}",), shape, dtype, role, stages=(stage,))
        for i, (shape, dtype, role, stage) in enumerate(drawn)
    ]
    layout = make_layout(tensors, PAGE_BYTES)
    wire = WireLayout(layout, Compression(form))
    end = 0
    for shard in layout.shards:
        low, size = wire.offset_bytes(shard), wire.size_bytes(shard)
        assert low >= end and low <= shard.offset_bytes and size <= shard.size_bytes
        end = low + size
        item = size // shard.numel
        for piece in shard.pieces:
            first = wire.tensor_offset_bytes(piece.tensor) + piece.tensor_start * item
            assert first == low + piece.shard_start * item
            assert wire.tensor_dtype(piece.tensor) == wire.dtype(shard)
        if shard.role is TensorRole.TRAINED:
            assert end <= wire.gradient_bytes
        if form is not Form.BF16_BOTH or shard.role is not TensorRole.TRAINED or shard.dtype != "float32":
            assert (low, size, wire.dtype(shard)) == (shard.offset_bytes, shard.size_bytes, shard.dtype)
        else:
            assert wire.dtype(shard) == "bfloat16" and size == shard.size_bytes // 2


def test_rounded_stages_lie_one_after_the_other_in_half_the_place() -> None:
    tensors = [TensorSpec((f"t{i}",), (1500,), "float32", TensorRole.TRAINED, stages=(i,)) for i in range(3)]
    layout = make_layout(tensors, PAGE_BYTES)
    wire = WireLayout(layout, Compression(Form.BF16_BOTH))
    assert [(shard.home, wire.offset_bytes(shard), wire.size_bytes(shard)) for shard in layout.shards] == [
        (0, 0, 2048),
        (0, 2048, 960),
        (1, 4096, 2048),
        (1, 6144, 960),
        (2, 8192, 2048),
        (2, 10240, 960),
    ]
    assert wire.gradient_bytes == 11200
