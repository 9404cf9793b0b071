"""Tables for people: what was compared, both figures, the ratio, the spread."""

from __future__ import annotations

from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.table import Table

from psa_store.bench.curve import Curve, curves
from psa_store.bench.names import PSA_TCP
from psa_store.bench.results import Comparison, Match, Quartiles, Series, moved_per_s
from psa_store.bench.targets import targets
from psa_store.bench.workload import Workload


def print_report(comparison: Comparison, console: Console) -> None:
    """Everything that was measured, and what follows from it."""
    for match in comparison.matches:
        console.print(_contenders(match, comparison.steps))
        console.print(_tcp_share(match), end="", soft_wrap=True)
    for name, why in comparison.absent.items():
        console.print(f"{name} took no part: {why}")
    if any(match.limits for match in comparison.matches):
        console.print(_limits(comparison))
    if any(targets(match) for match in comparison.matches):
        console.print(_targets(comparison))
    for curve in curves(comparison):
        console.print(_curve(curve), soft_wrap=True)


def title(workload: Workload) -> str:
    """What is compared, in a line."""
    clipped = "" if workload.clip is None else f", norm clipped at {workload.clip:g}"
    return f"{workload.size_bytes / 1e6:g} MB, {workload.rule.value}{clipped}, {workload.workers} workers"


def _contenders(match: Match, steps: int) -> Table:
    rounds = len(match.base.blocks_s)
    base = match.base.name
    table = _table(f"{title(match.workload)}: {rounds} blocks of {steps} steps each", "contender")
    for heading in ("ms per step", "quartiles", f"{base} / it", "quartiles"):
        table.add_column(heading, justify="right")
    for each in match.contenders:
        ratio = match.ratio(match.base, each)
        shown = ("", "") if each is match.base else (f"{ratio.median:.2f}", _range(ratio, lambda x: f"{x:.2f}"))
        times = each.quartiles_s
        table.add_row(each.name, _ms(times.median), _range(times, _ms), *shown)
    return table


def _tcp_share(match: Match) -> str:
    """How much of the raw stream psa over TCP uses; a line, or nothing."""
    tcp = match.find(PSA_TCP)
    share = match.share_of_stream(tcp) if tcp else None
    if tcp is None or share is None:
        return ""
    moved = moved_per_s(match.workload, tcp)
    return f"{PSA_TCP}: {moved / 1e9:.2f} GB/s, both directions; {share:.0%} of the raw loopback stream beside it\n"


def _limits(comparison: Comparison) -> Table:
    """Limits know nothing of workers: all rounds of all matches count."""
    first, *others = comparison.matches
    table = _table("limits of this machine", "limit")
    for heading in ("GB/s", "quartiles"):
        table.add_column(heading, justify="right")
    for limit in first.limits:
        blocks_s = sum((each.blocks_s for match in others if (each := match.find(limit.name))), limit.blocks_s)
        rate = first.rate(Series(limit.name, blocks_s))
        table.add_row(limit.name, f"{rate.median / 1e9:.2f}", _range(rate, lambda x: f"{x / 1e9:.2f}"))
    return table


def _targets(comparison: Comparison) -> Table:
    table = _table("targets", "ratio")
    for heading in ("workers", "at most", "measured", ""):
        table.add_column(heading, justify="right")
    for match in comparison.matches:
        for target in targets(match):
            table.add_row(
                f"{target.above} / {target.below}",
                str(match.workload.workers),
                f"{target.at_most:g}",
                f"{target.found:.3f}",
                "[green]met[/]" if target.met else "[red]missed[/]",
            )
    return table


def _curve(curve: Curve) -> str:
    points = ", ".join(f"{workers}: {_ms(time_s)}" for workers, time_s in curve.points)
    bend = "a quadratic term" if curve.bends_up else "no quadratic term beyond the spread of the blocks"
    return (
        f"{curve.name}, ms per step by workers: {points}\n"
        f"  slope {1e3 * curve.slope_s:+.2f} ms per added worker; second difference {1e3 * curve.bend_s:+.2f} ms "
        f"(90%: {1e3 * curve.bend_low_s:+.2f} to {1e3 * curve.bend_high_s:+.2f}): {bend}"
    )


def _table(title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    return table


def _ms(time_s: float) -> str:
    return f"{1e3 * time_s:.2f}" if time_s < 0.01 else f"{1e3 * time_s:.1f}"


def _range(spread: Quartiles, form: Callable[[float], str]) -> str:
    return f"{form(spread.low)}–{form(spread.high)}"
