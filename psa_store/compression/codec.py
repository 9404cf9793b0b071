"""Encodes and decodes what :mod:`psa_store.compression` describes. Used by workers to encode and by servers to decode.

Bytes depend on nothing else: not on the number of threads, alignment, or torch's generator, which is left alone. Zeros
and multiples of a block's scale come back exactly. Elements up to 2**126 come back finite; a larger one may count as
NaN. NaN and Inf come back not finite; in ``int8`` and ``int4`` as NaN together with the rest of their block; in
``topk`` the first k of them are sent, and the residual forgets the others.

All fields are little-endian. Thread-safe: nothing is shared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from psa_store.compression import GRIDS, HALF_BLOCK, Compression, Form, Grid
from psa_store.errors import Refused, UsageError

ELEMENTS_MAX = (1 << 31) - 1
"""Places travel as int32."""

_CHUNK = 1 << 15
"""Elements worked on at once, a multiple of all blocks: with their scratch they stay in a core's cache, and torch,
which splits larger pieces among threads and waits for the slowest, converts them at once. numpy never splits."""
_SAMPLE = 1 << 14

_Bytes = NDArray[np.uint8]
_Floats = NDArray[np.float32]


def encode(compression: Compression, flat: Tensor, out: Tensor, *, stream: int, residual: Tensor | None = None) -> None:
    """Write the encoding of ``flat`` into ``out``.

    Args:
        flat: contiguous 1-D float32 on the CPU, 1 to ELEMENTS_MAX elements; is not changed.
        out: contiguous uint8, ``payload_bytes`` of ``flat``'s length; need not be aligned.
        stream: see :func:`psa_store.job.sampling.rounding_stream`.
        residual: where ``needs_residual``: float32 as long as ``flat``. What was held back before is read from it,
            what is held back now is left in it: an encoding that is to be sent twice must be kept, not made twice.

    Raises:
        UsageError: lengths that do not fit together, or no residual where one is needed. Nothing was written.
    """
    n = flat.numel()
    if not 1 <= n <= ELEMENTS_MAX or out.numel() != compression.payload_bytes(n):
        raise UsageError(
            f"encoding {n} elements as {compression} into {out.numel()} bytes: give it 1 to {ELEMENTS_MAX} elements, "
            f"and payload_bytes({n}) = {compression.payload_bytes(n)} bytes"
        )
    match compression.form:
        case Form.NONE:
            out.copy_(flat.view(torch.uint8))
        case Form.BF16 | Form.BF16_BOTH:
            _typed(out.numpy(), torch.bfloat16).copy_(flat)
        case Form.FP16:
            _encode_half(flat.numpy(), out.numpy())
        case Form.INT8 | Form.INT4:
            with np.errstate(invalid="ignore"):
                _encode_levels(flat.numpy(), out.numpy(), GRIDS[compression.form], stream)
        case Form.TOPK:
            if residual is None or residual.numel() != n:
                raise UsageError(f"encoding {n} elements as {compression}: give it a residual of {n} elements")
            with np.errstate(invalid="ignore", over="ignore"):
                _encode_largest(flat.numpy(), out.numpy(), residual.numpy(), compression.kept(n))


def decode(compression: Compression, payload: Tensor, out: Tensor) -> None:
    """Write what ``payload`` stands for into ``out``.

    Args:
        payload: contiguous uint8, of any origin; need not be aligned.
        out: contiguous 1-D float32 on the CPU, as long as what was encoded.

    Raises:
        Refused: no encoding of so many elements looks like this. Nothing was written.
    """
    n = out.numel()
    if payload.numel() != compression.payload_bytes(n):
        raise Refused(
            f"{payload.numel()} bytes for {n} elements as {compression}, which are {compression.payload_bytes(n)}"
        )
    match compression.form:
        case Form.NONE:
            out.view(torch.uint8).copy_(payload)
        case Form.BF16 | Form.BF16_BOTH:
            out.copy_(_typed(payload.numpy(), torch.bfloat16))
        case Form.FP16:
            _decode_half(payload.numpy(), out.numpy())
        case Form.INT8 | Form.INT4:
            _decode_levels(payload.numpy(), out.numpy(), GRIDS[compression.form])
        case Form.TOPK:
            _decode_largest(payload.numpy(), out.numpy())


# float16: n halves, then for each block the biased exponent of its largest magnitude. It stands for the power of two
# that brings this magnitude to [2**14, 2**15), where rounding cannot overflow. The bounds keep that power and its
# inverse normal; at the upper one NaN, Inf and magnitudes from 2**127 on become what float16 has for them.
_EXPONENT_MIN = 15
_EXPONENT_MAX = 253


def _encode_half(flat: _Floats, out: _Bytes) -> None:
    n = len(flat)
    exponents = np.clip(_peaks(flat, HALF_BLOCK) >> 23, _EXPONENT_MIN, _EXPONENT_MAX)
    out[2 * n :] = exponents
    factors = ((268 - exponents) << 23).view(np.float32)
    halves = _typed(out[: 2 * n], torch.float16)
    work = np.empty(min(n, _CHUNK), np.float32)
    for low, high in _chunks(n):
        scaled = work[: high - low]
        _blockwise(np.multiply, flat[low:high], factors[low // HALF_BLOCK :], HALF_BLOCK, scaled)
        halves[low:high].copy_(torch.from_numpy(scaled))  # 30 times faster than numpy


def _decode_half(payload: _Bytes, out: _Floats) -> None:
    n = len(out)
    exponents = payload[2 * n :].astype(np.int32)
    if not ((exponents >= _EXPONENT_MIN) & (exponents <= _EXPONENT_MAX)).all():
        raise Refused(f"float16 with a block exponent outside {_EXPONENT_MIN}..{_EXPONENT_MAX}")
    factors = ((exponents - 14) << 23).view(np.float32)
    halves = _typed(payload[: 2 * n], torch.float16)
    for low, high in _chunks(n):
        part = out[low:high]
        torch.from_numpy(part).copy_(halves[low:high])
        _blockwise(np.multiply, part, factors[low // HALF_BLOCK :], HALF_BLOCK, part)


# Levels: a scale for each block, then codes: int8 as they are; int4 plus 8, the earlier of two in the low half of a
# byte. Scales are bfloat16 and at least 2**-126, so a code times its scale is exact and nothing here is subnormal. A
# scale of 0 says that the block held an element that is not finite.
_SCALE_MIN_BITS = 0x0080
_NOT_FINITE_BITS = 0
_ODD = np.uint64(0x0001_0001_0001_0001)


def _encode_levels(flat: _Floats, out: _Bytes, grid: Grid, stream: int) -> None:
    n = len(flat)
    scale_bytes, _ = grid.sizes(n)
    codes = out[scale_bytes:]
    bits = _scale_bits(_peaks(flat, grid.block), grid)
    out[:scale_bytes].view(np.int16)[:] = bits
    flawed = bits == _NOT_FINITE_BITS
    any_flawed = flawed.any()
    scales = (bits << 16).view(np.float32)
    scales[flawed] = np.inf
    random = np.random.SFC64(stream)
    work = np.empty(min(n + n % 2, _CHUNK), np.float32)
    noise = np.empty_like(work)
    for low, high in _chunks(n):
        size = high - low
        values = work[:size]
        _blockwise(np.divide, flat[low:high], scales[low // grid.block :], grid.block, values)
        if any_flawed:
            values[np.isnan(values)] = 0  # what NaN is as an integer is not defined
        # Rounding v + u to nearest, with u uniform in (-1/2, 1/2), is rounding v at random. u is an odd multiple of
        # 2**-16: an integer plus u is exact up to 127, and never half way between integers.
        words: NDArray[np.uint64] = random.random_raw(-(-size // 4))
        words |= _ODD
        noise[:size] = words.view(np.int16)[:size]
        noise *= np.float32(2.0**-16)
        values += noise[:size]
        np.rint(values, out=values)
        if grid.per_byte == 1:
            np.copyto(codes[low:high].view(np.int8), values, casting="unsafe")
        else:
            if size % 2:
                work[size] = 0
            pairs = (work[: size + size % 2] + np.float32(8)).astype(np.uint8).view(np.uint16)
            pairs |= pairs >> 4
            np.copyto(codes[low // 2 : (high + 1) // 2], pairs, casting="unsafe")


def _scale_bits(peaks: NDArray[np.int32], grid: Grid) -> NDArray[np.int32]:
    """The scales for blocks with these largest magnitudes, as bfloat16 bits."""
    ideal = peaks.view(np.float32) / np.float32(grid.levels)
    bits: NDArray[np.int32] = np.maximum((ideal.view(np.int32) + 0xFFFF) >> 16, _SCALE_MIN_BITS)  # rounded up
    return np.where(ideal <= grid.scale_max, bits, _NOT_FINITE_BITS)  # NaN is not <= anything


def _decode_levels(payload: _Bytes, out: _Floats, grid: Grid) -> None:
    n = len(out)
    scale_bytes, _ = grid.sizes(n)
    bits = payload[:scale_bytes].view(np.int16).astype(np.int32)
    codes = payload[scale_bytes:]
    scales = (bits << 16).view(np.float32)
    flawed = bits == _NOT_FINITE_BITS
    if not (flawed | ((bits >= _SCALE_MIN_BITS) & (scales <= grid.scale_max))).all():
        raise Refused(f"a block of levels up to {grid.levels} with a scale outside 2**-126..{grid.scale_max:g}")
    scales[flawed] = np.nan
    for low, high in _chunks(n):
        part = out[low:high]
        if grid.per_byte == 1:
            part[:] = codes[low:high].view(np.int8)
        else:
            pairs = codes[low // 2 : (high + 1) // 2].astype(np.uint16)
            pairs |= pairs << 4
            pairs &= 0x0F0F
            part[:] = pairs.view(np.int8)[: high - low]
            part -= 8
        _blockwise(np.multiply, part, scales[low // grid.block :], grid.block, part)


# The largest elements: their places as int32, ascending, then their values as float32.


def _encode_largest(flat: _Floats, out: _Bytes, residual: _Floats, count: int) -> None:
    residual += flat
    places = _largest(residual, count)
    values = residual[places]
    residual[places] = 0
    if not np.isfinite(values).all():
        residual[~np.isfinite(residual)] = 0
    out[: 4 * count].view(np.int32)[:] = places
    out[4 * count :].view(np.float32)[:] = values


def _decode_largest(payload: _Bytes, out: _Floats) -> None:
    places = payload[: len(payload) // 2].view(np.int32)
    values = payload[len(payload) // 2 :].view(np.float32)
    if not (places[0] >= 0 and places[-1] < len(out) and (places[1:] > places[:-1]).all()):
        raise Refused(f"topk with places that do not ascend within {len(out)} elements")
    out[:] = 0
    out[places] = values


def _largest(values: _Floats, count: int) -> NDArray[np.int64]:
    """The places of the ``count`` elements of largest magnitude, ascending; of equal ones the first. NaN is largest.

    All that reach a bound guessed from a sample are gathered, then cut to the exact number: the guess decides about
    speed alone.
    """
    bits = values.view(np.int32)
    sample = _magnitudes(bits[_sample_places(len(bits))])
    expected = count / len(bits) * len(sample)
    reach = math.ceil(expected + 4 * math.sqrt(expected)) + 8  # too few reach it once in 30,000 times
    while True:
        # A bound of 0 would gather everything where most elements are zero.
        bound = max(1, _nth_largest(sample, reach)) if reach <= len(sample) else 1
        places = _reaching(bits, bound)
        if len(places) >= count or bound == 1:
            break
        reach *= 4
    if len(places) < count:
        free = np.ones(count, np.bool_)
        free[places[places < count]] = False
        return np.sort(np.concatenate([places, np.flatnonzero(free)[: count - len(places)]]))
    found = _magnitudes(bits[places])
    least = _nth_largest(found, count)
    keep = found > least
    keep[np.flatnonzero(found == least)[: count - np.count_nonzero(keep)]] = True
    return places[keep]


def _nth_largest(values: NDArray[np.int32], nth: int) -> int:
    return int(np.partition(values, len(values) - nth)[len(values) - nth])


def _reaching(bits: NDArray[np.int32], bound: int) -> NDArray[np.int64]:
    """The places of all magnitudes of at least ``bound``, ascending."""
    found = [np.flatnonzero(_magnitudes(bits[low:high]) >= bound) + low for low, high in _chunks(len(bits))]
    return np.concatenate(found)


def _sample_places(n: int) -> NDArray[np.int64]:
    """Not at a regular distance, which might meet the same column of a matrix again and again."""
    if n <= _SAMPLE:
        return np.arange(n)
    return np.array(np.random.SFC64(n).random_raw(_SAMPLE) % np.uint64(n), np.int64)


def _magnitudes(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Magnitudes as integers: they compare like the floats, with NaN as the largest, and faster."""
    return bits & np.int32(0x7FFFFFFF)


def _peaks(flat: _Floats, block: int) -> NDArray[np.int32]:
    """The largest of each block's :func:`_magnitudes`."""
    bits = flat.view(np.int32)
    peaks = np.empty(-(-len(flat) // block), np.int32)
    for low, high in _chunks(len(flat)):
        magnitudes = _magnitudes(bits[low:high])
        rows, rest = divmod(high - low, block)
        first = low // block
        magnitudes[: rows * block].reshape(rows, block).max(axis=1, out=peaks[first : first + rows])
        if rest:
            peaks[-1] = magnitudes[rows * block :].max()
    return peaks


def _blockwise(operation: np.ufunc, flat: _Floats, fields: _Floats, block: int, out: _Floats) -> None:
    """Combine each block of ``flat``, of which the last may be shorter, with its one of ``fields``."""
    rows, rest = divmod(len(flat), block)
    whole = rows * block
    operation(flat[:whole].reshape(rows, block), fields[:rows, None], out=out[:whole].reshape(rows, block))
    if rest:
        operation(flat[whole:], fields[rows], out=out[whole:])


def _chunks(n: int) -> Iterator[tuple[int, int]]:
    return ((low, min(n, low + _CHUNK)) for low in range(0, n, _CHUNK))


def _typed(fields: _Bytes, dtype: torch.dtype) -> Tensor:
    """The same memory as a tensor. Tensor.view alone refuses memory at an offset that is no multiple of an item."""
    return torch.from_numpy(fields).view(dtype)
