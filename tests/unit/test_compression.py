"""Compressed gradients: as close as promised, the same bytes everywhere, and nothing believed that a peer sends.

One file, since every promise is checked of every compression, on the same gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from psa_store.compression import NONE, Compression, codec, parse_compression
from psa_store.errors import Refused, UsageError
from psa_store.job.sampling import rounding_stream

TEXTS = ("none", "bf16", "bf16:both", "fp16", "int8", "int4", "topk:0.1")
LEVELS = {"int8": (127, 256), "int4": (7, 64)}
EVERY_FORM = pytest.mark.parametrize("text", TEXTS)
EVERY_GRID = pytest.mark.parametrize("text", LEVELS)
CHUNK = codec._CHUNK
RAGGED = (1, 2, 3, 63, 64, 65, 255, 256, 257, 4096, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 257)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def encoded(compression: Compression, flat: Tensor, stream: int = 1, residual: Tensor | None = None) -> Tensor:
    payload = torch.full((compression.payload_bytes(flat.numel()),), 0xA5, dtype=torch.uint8)
    if residual is None and compression.needs_residual:
        residual = torch.zeros_like(flat)
    codec.encode(compression, flat, payload, stream=stream, residual=residual)
    return payload


def decoded(compression: Compression, payload: Tensor, n: int) -> Tensor:
    out = torch.full((n,), 7.5)
    codec.decode(compression, payload, out)
    return out


def there_and_back(compression: Compression, flat: Tensor, stream: int = 1) -> Tensor:
    return decoded(compression, encoded(compression, flat, stream), flat.numel())


def peaks(flat: Tensor, block: int) -> NDArray[np.float64]:
    """For each element, the largest magnitude of its block."""
    sizes = flat.double().abs().numpy()
    return np.concatenate([np.full(len(part), part.max()) for part in np.split(sizes, range(block, len(sizes), block))])


def scale_bound(flat: Tensor, text: str) -> NDArray[np.float64]:
    levels, block = LEVELS[text]
    return np.maximum(peaks(flat, block) / levels * (1 + 2**-7), 2.0**-126)


@contextmanager
def threads(count: int) -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(former)


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    """Blocks of very different sizes, with zeros, from the smallest to very large magnitudes."""
    n = draw(st.sampled_from(RAGGED[:10]) | st.integers(1, 1500))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    exponents = np.repeat(random.uniform(-45, 30, -(-n // 32)), 32)[:n]
    values = random.standard_normal(n) * 10**exponents * (random.random(n) < draw(st.sampled_from([0.01, 0.5, 1.0])))
    return torch.from_numpy(values.astype(np.float32))


# --- names and sizes


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        *((text, text) for text in TEXTS),
        ("topk:.010", "topk:0.01"),
        ("topk:1e-3", "topk:0.001"),
        ("topk:1e-7", "topk:1e-07"),
    ],
)
def test_the_text_is_read_and_given_back(text: str, canonical: str) -> None:
    compression = parse_compression(text)
    assert str(compression) == canonical
    assert parse_compression(canonical) == compression
    assert compression.needs_residual == text.startswith("topk")


def test_nothing_is_done_by_default() -> None:
    assert Compression() == NONE == parse_compression("none")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "int2",
        "INT8",
        "int8:256",
        "bf16:",
        "topk",
        "topk:",
        "topk:0",
        "topk:-0.1",
        "topk:0.51",
        "topk:nan",
        "topk:x",
    ],
)
def test_nonsense_is_refused_with_a_way_out(text: str) -> None:
    with pytest.raises(UsageError, match=r"topk:0\.01"):
        parse_compression(text)


@pytest.mark.parametrize(
    ("text", "n", "size"),
    [
        ("none", 1000, 4000),
        ("bf16", 1000, 2000),
        ("bf16:both", 1000, 2000),
        ("fp16", 1000, 2000 + 4),
        ("fp16", 1024, 2048 + 4),
        ("int8", 1000, 1000 + 8),
        ("int8", 1025, 1025 + 10),
        ("int4", 1001, 501 + 32),
        ("int4", 64, 32 + 2),
        ("topk:0.01", 1000, 80),
        ("topk:0.01", 1001, 88),
        ("topk:0.07", 100, 56),
        ("topk:1e-7", 1000, 8),
    ],
)
def test_sizes_are_known_beforehand(text: str, n: int, size: int) -> None:
    assert parse_compression(text).payload_bytes(n) == size


@pytest.mark.parametrize(
    ("text", "ratio"),
    [("bf16", 2.0), ("fp16", 1.99), ("int8", 3.96), ("int4", 7.5), ("topk:0.01", 49.9), ("topk:0.001", 499)],
)
def test_as_many_times_smaller_as_the_name_says(text: str, ratio: float) -> None:
    n = 1 << 22
    assert 4 * n / parse_compression(text).payload_bytes(n) >= ratio


@EVERY_FORM
@pytest.mark.parametrize("n", RAGGED)
def test_every_byte_is_written_and_none_beside_them(text: str, n: int) -> None:
    compression = parse_compression(text)
    flat, size = normal(n), compression.payload_bytes(n)
    payloads = []
    for fill, offset in itertools.product((0, 0xFF), (1, 4, 7)):
        memory = torch.full((size + 16,), fill, dtype=torch.uint8)
        residual = torch.zeros(n) if compression.needs_residual else None
        codec.encode(compression, flat, memory[offset : offset + size], stream=3, residual=residual)
        assert bool((memory[:offset] == fill).all()) and bool((memory[offset + size :] == fill).all())
        payloads.append(memory[offset : offset + size])
    assert all(torch.equal(payload, payloads[0]) for payload in payloads)
    assert torch.equal(flat, normal(n))

    memory = torch.full((n + 2,), 7.5)
    codec.decode(compression, payloads[0], memory[1:-1])
    assert memory[0] == memory[-1] == 7.5
    assert torch.equal(memory[1:-1], decoded(compression, payloads[-1], n))


def test_what_does_not_fit_together_is_refused_before_anything_is_written() -> None:
    flat = normal(1000)
    for compression, size in itertools.product(map(parse_compression, TEXTS), (-1, 1)):
        payload = torch.zeros(compression.payload_bytes(1000) + size, dtype=torch.uint8)
        with pytest.raises(UsageError, match="payload_bytes"):
            codec.encode(compression, flat, payload, stream=0, residual=torch.zeros(1000))
        assert not payload.any()
    top = parse_compression("topk:0.1")
    for residual in (None, torch.zeros(999)):
        payload = torch.zeros(top.payload_bytes(1000), dtype=torch.uint8)
        with pytest.raises(UsageError, match="residual of 1000"):
            codec.encode(top, flat, payload, stream=0, residual=residual)
        assert not payload.any()


# --- how close


@given(gradients())
def test_none_is_exact(flat: Tensor) -> None:
    assert torch.equal(there_and_back(NONE, flat), flat)


@given(gradients())
def test_bf16_is_rounded_to_nearest_even(flat: Tensor) -> None:
    bits = flat.numpy().view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    assert torch.equal(there_and_back(parse_compression("bf16"), flat), torch.from_numpy(nearest))


@given(gradients())
def test_fp16_keeps_11_bits_of_all_but_the_smallest_of_a_block(flat: Tensor) -> None:
    error = (there_and_back(parse_compression("fp16"), flat).double() - flat.double()).abs().numpy()
    bound = np.maximum(flat.double().abs().numpy() * 2**-11, peaks(flat, 256) * 2**-39)
    assert (error <= np.maximum(bound, 2.0**-149)).all()


@EVERY_GRID
@given(flat=gradients(), stream=st.integers(0, 2**63 - 1))
def test_levels_are_less_than_one_level_away(text: str, flat: Tensor, stream: int) -> None:
    error = (there_and_back(parse_compression(text), flat, stream).double() - flat.double()).abs().numpy()
    assert (error < scale_bound(flat, text)).all()


@EVERY_GRID
def test_the_largest_of_a_block_never_falls_beyond_the_last_level(text: str) -> None:
    # Just above, at, and just below what the largest code of each possible scale stands for.
    levels, block = LEVELS[text]
    mantissas, exponents = np.arange(128) / 128 + 1, 2.0 ** np.arange(-120, 120, 23)
    tops = (levels * mantissas * exponents[:, None]).astype(np.float32).ravel()
    tops = np.concatenate([np.nextafter(tops, np.float32(np.inf)), tops, np.nextafter(tops, np.float32(0))])
    values = np.zeros((len(tops), block), np.float32)
    values[:, 0], values[:, 1] = tops, -tops
    flat = torch.from_numpy(values.ravel())
    for stream in range(8):
        error = (there_and_back(parse_compression(text), flat, stream).double() - flat.double()).abs().numpy()
        assert (error < scale_bound(flat, text)).all()


@EVERY_GRID
@given(seed=st.integers(0, 2**32), n=st.integers(1, 1500), stream=st.integers(0, 2**63 - 1))
def test_multiples_of_a_scale_come_back_exactly(text: str, seed: int, n: int, stream: int) -> None:
    levels, block = LEVELS[text]
    random = np.random.default_rng(seed)
    scales = (
        (1 + random.integers(0, 128, -(-n // block)) / 128) * 2.0 ** random.integers(-126, 100, -(-n // block))
    ).astype(np.float32)
    codes = random.integers(-levels, levels + 1, n)
    codes[::block] = levels  # so that the scale is this one
    flat = torch.from_numpy((codes * np.repeat(scales, block)[:n]).astype(np.float32))
    assert torch.equal(there_and_back(parse_compression(text), flat, stream), flat)


@EVERY_GRID
def test_no_random_number_moves_a_multiple_of_a_scale(text: str) -> None:
    # There are 65536 random numbers, so this many elements meet nearly all of them.
    flat = torch.full((1 << 19,), float(LEVELS[text][0]))
    assert torch.equal(there_and_back(parse_compression(text), flat), flat)


@EVERY_FORM
@pytest.mark.parametrize("n", RAGGED)
def test_zeros_stay_zeros(text: str, n: int) -> None:
    assert not there_and_back(parse_compression(text), torch.zeros(n)).any()


@EVERY_FORM
@pytest.mark.parametrize("magnitude", [2.0**-149, 1e-38, 1e-20, 1.0, 1e30, 2.0**126])
def test_what_is_finite_stays_finite_at_every_magnitude(text: str, magnitude: float) -> None:
    flat = (normal(3000).clamp(-1, 1) * magnitude).contiguous()
    flat[::100] = magnitude
    back = there_and_back(parse_compression(text), flat)
    assert bool(back.isfinite().all())
    assert float(back.abs().max()) == pytest.approx(magnitude, rel=0.01, abs=2.0**-126)


@EVERY_FORM
@pytest.mark.parametrize("magnitude", [1.2e38, 1.6e38, 2e38, 3.3e38, 3.4028e38])
def test_what_is_too_large_comes_out_close_or_not_finite_but_is_never_refused(text: str, magnitude: float) -> None:
    flat = torch.tensor([magnitude, -magnitude, 0.0] * 200)
    back = there_and_back(parse_compression(text), flat)[:60]  # of which topk:0.1 sends each that is not zero
    close = (back.double() - flat[:60].double()).abs() < magnitude / 7 * (1 + 2**-7)
    assert bool((close | ~back.isfinite()).all())


@pytest.mark.parametrize("flaw", [math.nan, math.inf, -math.inf])
@EVERY_FORM
def test_what_is_not_finite_comes_out_not_finite_and_harms_no_other_block(text: str, flaw: float) -> None:
    compression = parse_compression(text)
    whole = normal(CHUNK + 1000)
    clean = there_and_back(compression, whole)
    for place in (300, CHUNK + 999):
        flat = whole.clone()
        flat[place] = flaw
        back = there_and_back(compression, flat)
        assert not back[place].isfinite()
        others = torch.ones_like(flat, dtype=torch.bool)
        others[place // 256 * 256 : place // 256 * 256 + 256] = False
        if not compression.needs_residual:
            assert torch.equal(back[others], clean[others])


def test_bytes_are_defined_even_for_blocks_that_are_not_finite() -> None:
    for text, (_, block) in LEVELS.items():
        flat = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -3e38] * 200)
        payload = encoded(parse_compression(text), flat)
        scales = 2 * -(-1000 // block)
        assert not payload[:scales].any()
        assert set(payload[scales:].tolist()) == ({0} if text == "int8" else {0x88})


# --- rounding at random


@EVERY_GRID
def test_rounding_at_random_is_right_on_average(text: str) -> None:
    levels, block = LEVELS[text]
    n, rounds = 16 * block + 17, 600
    flat = (torch.rand(n, generator=torch.Generator().manual_seed(0)) * 2 - 1) * levels / 32
    flat[::block] = levels / 32  # the scale of every block is 1/32
    draws = torch.stack([there_and_back(parse_compression(text), flat, stream) for stream in range(rounds)]).double()
    part = (flat.double() * 32) % 1
    deviation = (part * (1 - part)).sqrt() / 32
    uncertain = deviation > 0.1 / 32
    assert int(uncertain.sum()) > n // 2
    errors = (draws.mean(0) - flat.double())[uncertain] / (deviation[uncertain] / math.sqrt(rounds))
    # Means of independent draws: each within 5 standard errors, all together within 4, and as spread as they should be.
    assert float(errors.abs().max()) < 5
    assert abs(float(errors.mean())) * math.sqrt(len(errors)) < 4
    assert float(errors.square().mean()) == pytest.approx(1.0, abs=0.15)
    # The draws of one stream are independent of each other: their sum spreads as the square root of their number.
    sums = (draws - flat.double()).sum(1) / deviation.square().sum().sqrt()
    assert float(sums.square().mean()) == pytest.approx(1.0, abs=0.3)
    neighbours = ((draws - flat.double())[:, 1:] * (draws - flat.double())[:, :-1]).mean() * 32**2
    assert abs(float(neighbours)) < 0.001


@EVERY_GRID
def test_a_value_far_below_a_level_survives_on_average(text: str) -> None:
    levels, _ = LEVELS[text]
    flat = torch.full((1 << 18,), 0.001)
    flat[::64] = levels
    small = there_and_back(parse_compression(text), flat).view(-1, 64)[:, 1:]
    assert set(small.flatten().tolist()) == {0.0, 1.0}
    assert float(small.mean()) == pytest.approx(0.001, rel=0.3)  # five standard deviations


def test_another_seed_step_rank_or_shard_rounds_differently() -> None:
    calls = list(itertools.product((0, 1, 2**40), (0, 1, 11), (0, 1, 11), (0, 1, 11)))
    streams = [rounding_stream(*call) for call in calls]
    assert len(set(streams)) == len(calls)
    assert streams == [rounding_stream(*call) for call in calls]
    for text in LEVELS:
        few = [encoded(parse_compression(text), normal(5000), stream) for stream in streams[:5]]
        assert all(not torch.equal(one, other) for one, other in itertools.combinations(few, 2))


# --- the same bytes everywhere


@EVERY_FORM
def test_bytes_do_not_depend_on_threads_and_leave_generators_alone(text: str) -> None:
    compression = parse_compression(text)
    flat = normal(5 * CHUNK + 333)
    torch_state, numpy_state = torch.get_rng_state(), str(np.random.get_state())
    payloads, gradients = [], []
    for count in (1, 2, 3):
        with threads(count):
            payloads.append(encoded(compression, flat, stream=9))
            gradients.append(decoded(compression, payloads[0], flat.numel()))
    assert torch.equal(payloads[0], payloads[1]) and torch.equal(payloads[0], payloads[2])
    assert torch.equal(gradients[0], gradients[1]) and torch.equal(gradients[0], gradients[2])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == numpy_state


@pytest.mark.parametrize("chunk", [256, 1024, 1 << 20])
@EVERY_FORM
def test_bytes_do_not_depend_on_how_the_work_is_cut(text: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = normal(2 * CHUNK + 333)
    whole = encoded(parse_compression(text), flat)
    back = decoded(parse_compression(text), whole, flat.numel())
    monkeypatch.setattr(codec, "_CHUNK", chunk)
    assert torch.equal(encoded(parse_compression(text), flat), whole)
    assert torch.equal(decoded(parse_compression(text), whole, flat.numel()), back)


@pytest.mark.parametrize(
    ("text", "digest"),
    [
        ("none", "c22a7c20afe375e7"),
        ("bf16", "c6f43ffc25def88f"),
        ("fp16", "e8d0abc69cd0c512"),
        ("int8", "cbd785c1cc665694"),
        ("int4", "4b5f69f14a335c94"),
        ("topk:0.1", "e867854fb01740cb"),
    ],
)
def test_bytes_are_these_for_ever(text: str, digest: str) -> None:
    # A resumed job, and the workers of one step, may run on machines with other versions of torch and numpy.
    numbers = np.arange(70_001, dtype=np.int64)
    flat = ((numbers * 2654435761 % 65537 - 32768) * 2.0 ** (numbers // 977 % 40 - 30)).astype(np.float32)
    payload = encoded(parse_compression(text), torch.from_numpy(flat), rounding_stream(1, 2, 3, 4))
    assert xxh3_64_hexdigest(payload.numpy().data) == digest


# --- the largest elements


def largest_places(values: Tensor, count: int) -> list[int]:
    """By the definition: of equal magnitudes, those that come first."""
    sizes = values.abs().tolist()
    return sorted(sorted(range(len(sizes)), key=lambda place: (-sizes[place], place))[:count])


def places_and_values(payload: Tensor) -> tuple[list[int], Tensor]:
    half = payload.numel() // 2
    return payload[:half].view(torch.int32).tolist(), payload[half:].view(torch.float32)


@given(
    values=st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.5, 1e-40, 1e30])
        | st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100),
        min_size=1,
        max_size=300,
    ),
    fraction=st.sampled_from([0.001, 0.1, 0.3, 0.5]),
)
def test_exactly_the_largest_are_sent_and_the_others_are_held_back(values: list[float], fraction: float) -> None:
    flat = torch.tensor(values, dtype=torch.float32)
    residual = torch.zeros_like(flat)
    compression = parse_compression(f"topk:{fraction}")
    payload = encoded(compression, flat, residual=residual)
    places, sent = places_and_values(payload)
    assert places == largest_places(flat, math.ceil(len(values) * fraction))
    assert torch.equal(sent, flat[places])
    back = decoded(compression, payload, len(values))
    assert torch.equal(back + residual, flat)
    assert not residual[places].any()


def spread(n: int, kind: str) -> Tensor:
    flat = normal(n)
    match kind:
        case "sparse":
            flat[torch.rand(n, generator=torch.Generator().manual_seed(1)) > 0.002] = 0
        case "equal":
            flat.fill_(-1.5)
        case "column":
            flat[:: 1 << 10] *= 1000
        case "front":
            flat[1000:] *= 1e-6
        case "one":
            flat.zero_()[n // 2] = 3.0
    return flat


@pytest.mark.parametrize("fraction", [0.0005, 0.01, 0.3])
@pytest.mark.parametrize("kind", ["normal", "sparse", "equal", "column", "front", "one"])
def test_the_largest_of_many_are_found_however_they_lie(kind: str, fraction: float) -> None:
    flat = spread(200_003, kind)
    payload = encoded(parse_compression(f"topk:{fraction}"), flat)
    assert places_and_values(payload)[0] == largest_places(flat, math.ceil(len(flat) * fraction))


@pytest.mark.parametrize("guess", [0, -1])
def test_a_sample_that_misleads_changes_nothing(guess: int, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = spread(100_003, "normal")
    extremes = np.argsort(flat.abs().numpy())
    far_off = np.full(1000, extremes[guess])
    monkeypatch.setattr(codec, "_sample_places", lambda n: far_off)
    payload = encoded(parse_compression("topk:0.01"), flat)
    assert places_and_values(payload)[0] == largest_places(flat, 1001)


@pytest.mark.parametrize("fraction", [0.01, 0.2])
def test_nothing_is_lost_between_what_was_sent_and_what_is_held_back(fraction: float) -> None:
    compression, n = parse_compression(f"topk:{fraction}"), 3001
    residual = torch.zeros(n)
    given, received = torch.zeros(n, dtype=torch.float64), torch.zeros(n, dtype=torch.float64)
    for step in range(100):
        flat = normal(n, seed=step)
        given += flat
        received += decoded(compression, encoded(compression, flat, residual=residual), n)
        # One rounding of a float32 sum a step.
        assert float((received + residual - given).abs().max()) < (step + 1) * 2.0**-24 * 64
    assert float((received - given).abs().max()) > 0.1


def test_small_elements_are_sent_once_they_add_up() -> None:
    compression, n = parse_compression("topk:0.05"), 1000
    flat = torch.full((n,), 0.001)
    flat[:50] = 0.04  # for a while the largest of all
    residual, received = torch.zeros(n), torch.zeros(n)
    for _ in range(100):
        received += decoded(compression, encoded(compression, flat, residual=residual), n)
    assert float((received > 0).double().mean()) > 0.9
    assert bool((received + residual - flat * 100).abs().max() < 1e-5)


def test_the_residual_forgets_what_is_not_finite() -> None:
    compression = parse_compression("topk:0.01")
    flat = normal(1000)
    flat[100:200] = math.nan
    flat[200] = math.inf
    residual = torch.zeros(1000)
    back = decoded(compression, encoded(compression, flat, residual=residual), 1000)
    assert int((~back.isfinite()).sum()) == 10
    assert bool(residual.isfinite().all()) and not residual[100:201].any()
    assert torch.equal(residual[201:], flat[201:])


# --- what a peer may send


@EVERY_FORM
@pytest.mark.parametrize("wrong", [-4, -1, 1, 8])
def test_a_payload_of_another_length_is_refused(text: str, wrong: int) -> None:
    compression = parse_compression(text)
    out = torch.full((1001,), 7.5)
    with pytest.raises(Refused, match="bytes for 1001 elements"):
        codec.decode(compression, torch.zeros(compression.payload_bytes(1001) + wrong, dtype=torch.uint8), out)
    assert bool((out == 7.5).all())


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80, 0x8000, 0xBF80, 0x0001, 0x007F, 0x7D81])
@EVERY_GRID
def test_a_scale_that_is_none_is_refused(text: str, bits: int) -> None:
    compression, (_, block) = parse_compression(text), LEVELS[text]
    n = 2 * CHUNK + 5
    for place in (0, n // block):
        payload = encoded(compression, normal(n))
        payload[2 * place : 2 * place + 2] = torch.tensor([bits & 0xFF, bits >> 8], dtype=torch.uint8)
        out = torch.full((n,), 7.5)
        with pytest.raises(Refused, match="scale"):
            codec.decode(compression, payload, out)
        assert bool((out == 7.5).all())


@pytest.mark.parametrize("exponent", [0, 14, 254, 255])
def test_a_block_exponent_that_is_none_is_refused(exponent: int) -> None:
    compression, n = parse_compression("fp16"), 2 * CHUNK + 5
    for place in (2 * n, -1):
        payload = encoded(compression, normal(n))
        payload[place] = exponent
        out = torch.full((n,), 7.5)
        with pytest.raises(Refused, match="exponent"):
            codec.decode(compression, payload, out)
        assert bool((out == 7.5).all())


@pytest.mark.parametrize(
    "places",
    [[-1, 3, 5], [0, 3, 30], [0, 3, 3], [0, 5, 3], [3, 0, 5], [0, 2**31 - 1, 5], [-(2**31), 0, 1], [0, -1, 5]],
)
def test_places_that_do_not_ascend_within_the_shard_are_refused(places: list[int]) -> None:
    compression = parse_compression("topk:0.1")
    payload = torch.cat([torch.tensor(places, dtype=torch.int32).view(torch.uint8), torch.ones(3).view(torch.uint8)])
    out = torch.full((30,), 7.5)
    with pytest.raises(Refused, match="ascend within 30"):
        codec.decode(compression, payload, out)
    assert bool((out == 7.5).all())


@settings(max_examples=300)
@given(text=st.sampled_from(TEXTS), n=st.integers(1, 700), seed=st.integers(0, 2**32), flips=st.integers(1, 20))
def test_whatever_bytes_come_nothing_else_is_touched(text: str, n: int, seed: int, flips: int) -> None:
    compression = parse_compression(text)
    random = np.random.default_rng(seed)
    payload = encoded(compression, torch.from_numpy(random.standard_normal(n).astype(np.float32)))
    if flips < 15:
        for place in random.integers(0, len(payload), flips):
            payload[int(place)] ^= int(random.integers(1, 256))
    else:
        payload = torch.from_numpy(random.integers(0, 256, len(payload), dtype=np.uint8))
    memory = torch.full((n + 2,), 7.5)
    try:
        codec.decode(compression, payload, memory[1:-1])
    except Refused:
        assert bool((memory == 7.5).all())
    assert memory[0] == memory[-1] == 7.5
    if text in LEVELS:
        assert not memory.isinf().any()
