"""Rates that were sampled, one for each step, as few pieces of a low degree.

A cosine over any number of steps takes about a hundred pieces, a rate that changes now and then one a change.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from psa_store.optim.schedules import Pieces

PIECES_MAX = 2000
"""About 200 KB in the job's document."""
TOLERANCE = 1e-8
"""Of a rate: float32 tells 6e-8 apart."""
_DIGITS = 9
"""Of a sampled rate. Two machines' cosines may differ in the 16th: both read the same rate, and write the same
document."""

_Rates = npt.NDArray[np.float64]


def pieces_of(rates: Sequence[float]) -> Pieces | None:
    """The schedule that gives these rates, within ``TOLERANCE`` of each; None if it takes too many pieces.

    A last rate that stays is sampled once, so that rates that come to rest are one document for any number of steps.
    """
    known = np.array([round_rate(rate) for rate in rates])
    tolerances = TOLERANCE * known + 1e-12 * known.max()
    pieces: list[tuple[int, tuple[float, ...]]] = []
    start = 0
    while start < len(known):
        if len(pieces) == PIECES_MAX:
            return None
        length, numbers = _longest(known[start:], tolerances[start:])
        pieces.append((start, numbers))
        start += length
    last, numbers = pieces[-1]
    return Pieces(tuple(pieces), last + 1 if len(numbers) == 1 else len(known))


def round_rate(rate: float) -> float:
    """As a sampled rate is kept."""
    return float(f"{rate:.{_DIGITS}g}")


def _longest(rates: _Rates, tolerances: _Rates) -> tuple[int, tuple[float, ...]]:
    """Of the pieces that start here and fit: a long one, found by doubling and then by halves."""
    fits, fails = 1, len(rates) + 1
    best: tuple[float, ...] = (float(rates[0]),)
    while fits + 1 < fails:
        length = min(2 * fits, len(rates)) if fails > len(rates) else (fits + fails) // 2
        found = _fit(rates[:length], tolerances[:length])
        if found is None:
            fails = length
        else:
            fits, best = length, found
    return fits, best


def _fit(rates: _Rates, tolerances: _Rates) -> tuple[float, ...] | None:
    """The polynomial of the lowest degree of 0, 1 and 3 that is near enough at all steps."""
    steps = np.arange(len(rates), dtype=np.float64)
    for degree in (0, 1, 3):
        if degree < len(rates):
            numbers = _through(
                rates, [round(i * (len(rates) - 1) / degree) for i in range(degree + 1)] if degree else [0]
            )
            if bool((np.abs(_values(numbers, steps) - rates) <= tolerances).all()):
                return numbers
    return None


def _through(rates: _Rates, nodes: Sequence[int]) -> tuple[float, ...]:
    """The polynomial through the rates at ``nodes`` (Newton's divided differences, multiplied out)."""
    table = [float(rates[node]) for node in nodes]
    for order in range(1, len(nodes)):
        for i in range(len(nodes) - 1, order - 1, -1):
            table[i] = (table[i] - table[i - 1]) / (nodes[i] - nodes[i - order])
    numbers = [table[-1]]
    for node, difference in zip(reversed(nodes[:-1]), reversed(table[:-1]), strict=True):
        shifted = [0.0, *numbers]
        for i, number in enumerate(numbers):
            shifted[i] -= node * number
        shifted[0] += difference
        numbers = shifted
    return tuple(numbers)


def _values(numbers: Sequence[float], steps: _Rates) -> _Rates:
    """Those of a polynomial, by the arithmetic of :meth:`Pieces.at`."""
    values = np.full_like(steps, numbers[-1])
    for number in reversed(numbers[:-1]):
        values = values * steps + number
    return values
