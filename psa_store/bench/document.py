"""The results for programs, as one JSON document."""

from __future__ import annotations

import os
import platform
from typing import Any

import torch

from psa_store.bench.curve import curves
from psa_store.bench.names import PSA_TCP
from psa_store.bench.results import Comparison, Match, Quartiles
from psa_store.bench.targets import targets


def to_document(comparison: Comparison) -> dict[str, Any]:
    """Names of members end with their units; times are those of one step, by round in ``blocks_ms``."""
    workload = comparison.matches[0].workload
    return {
        "bytes": workload.size_bytes,
        "optimizer": workload.rule.value,
        "clip_grad_norm": workload.clip,
        "steps_per_block": comparison.steps,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "matches": [_match(match) for match in comparison.matches],
        "absent": dict(comparison.absent),
        "curves": [
            {
                "name": curve.name,
                "ms_by_workers": {str(workers): 1e3 * time_s for workers, time_s in curve.points},
                "slope_ms_per_worker": 1e3 * curve.slope_s,
                "second_difference_ms": 1e3 * curve.bend_s,
                "second_difference_90_percent_ms": [1e3 * curve.bend_low_s, 1e3 * curve.bend_high_s],
                "quadratic": curve.bends_up,
            }
            for curve in curves(comparison)
        ],
    }


def _match(match: Match) -> dict[str, Any]:
    tcp = match.find(PSA_TCP)
    return {
        "workers": match.workload.workers,
        "base": match.base.name,
        "contenders": [
            {
                "name": each.name,
                **_with_unit("ms", each.quartiles_s, 1e3),
                "ratio": match.ratio(match.base, each).median,
                "ratio_quartiles": _pair(match.ratio(match.base, each)),
                "blocks_ms": [1e3 * time_s for time_s in each.blocks_s],
            }
            for each in match.contenders
        ],
        "limits": [{"name": each.name, **_with_unit("bytes_per_s", match.rate(each))} for each in match.limits],
        "tcp_share_of_stream": match.share_of_stream(tcp) if tcp else None,
        "targets": [
            {"above": each.above, "below": each.below, "at_most": each.at_most, "ratio": each.found, "met": each.met}
            for each in targets(match)
        ],
    }


def _with_unit(unit: str, spread: Quartiles, factor: float = 1.0) -> dict[str, Any]:
    return {f"median_{unit}": factor * spread.median, f"quartiles_{unit}": _pair(spread, factor)}


def _pair(spread: Quartiles, factor: float = 1.0) -> list[float]:
    return [factor * spread.low, factor * spread.high]
