"""The numbers of a run, for people in words and for programs as JSON. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psa_store.observe.report.run import Run, State

GOODPUT = (
    "Goodput: the time that the versions which stayed take at the normal rate, over all time in which the job was not "
    "at rest. Normal is the median of undisturbed stretches with as many workers. Versions computed again count once, "
    "those that a rollback left behind do not count; rests, in which every server had left in order, are no time."
)


def summary(run: Run) -> dict[str, Any]:
    """Everything but the curve; JSON can say it. Times are seconds since 1970."""
    last = run.points[-1] if run.points else None
    losses = [each.loss for each in run.points if each.loss is not None]
    workers = [each.workers for each in run.points if each.workers]
    servers = [each.servers for each in run.points if each.servers]
    return {
        "job": run.job,
        "finished": run.finished,
        "begin": run.begin_s,
        "end": run.end_s,
        "running_s": run.time_s(State.RUNNING),
        "down_s": run.time_s(State.DOWN),
        "rest_s": run.time_s(State.REST),
        "goodput": run.goodput,
        "versions_per_s": run.rate,
        "version": run.version,
        "samples": round(run.samples),
        "loss": losses[-1] if losses else None,
        "loss_min": min(losses, default=None),
        "terms": run.terms,
        "workers": [min(workers, default=0), max(workers, default=0)],
        "servers": [min(servers, default=0), max(servers, default=0)],
        "committed": last.committed if last else 0,
        "computed_again": run.again,
        "interval_s": run.interval_s,
        "clock_back_s": run.clock_back_s,
        "failures": [
            {
                "time": each.time_s,
                "what": each.what,
                "servers": list(each.servers),
                "workers": list(each.workers),
                "pause_s": each.pause_s,
                "computed_again": each.again,
                "version": each.version,
                "text": each.text,
            }
            for each in run.failures
        ],
        "rollbacks": [
            {"time": each.time_s, "version": each.version, "lost": each.lost, "text": each.text}
            for each in run.rollbacks
        ],
        "checkpoints": [
            {
                "time": each.time_s,
                "name": each.name,
                "version": each.version,
                "reason": each.reason,
                "bytes": each.bytes,
            }
            for each in run.checkpoints
        ],
    }


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The numbers of a :func:`summary` that matter most, each with its name."""
    state = "finished" if found["finished"] else "not finished"
    pauses = [each["pause_s"] for each in found["failures"] if each["pause_s"] is not None]
    longest = f", the longest pause {duration(max(pauses))}" if pauses else ""
    rows = [
        ("version", f"{found['version']:,} ({state})"),
        ("goodput", "too short to tell" if found["goodput"] is None else f"{found['goodput']:.1%}"),
        (
            "time",
            f"{duration(found['running_s'])} running, {duration(found['down_s'])} down, "
            f"{duration(found['rest_s'])} at rest",
        ),
        (
            "speed",
            "unknown" if found["versions_per_s"] is None else f"{found['versions_per_s']:.3g} versions/s, usually",
        ),
        ("samples", f"about {found['samples']:,}"),
        ("loss", "not told" if found["loss"] is None else f"{found['loss']:.4g}, least {found['loss_min']:.4g}"),
        ("failures", f"{len(found['failures'])}{longest}"),
        ("computed again", f"{found['computed_again']:,} versions after failures"),
        ("rollbacks", str(len(found["rollbacks"]))),
        ("terms", str(found["terms"])),
        ("members", f"{_range(found['workers'])} workers, {_range(found['servers'])} servers"),
        ("checkpoints", str(len(found["checkpoints"]))),
    ]
    if found["clock_back_s"] > 0.0:
        rows.append(("clocks", f"went back by {duration(found['clock_back_s'])}: times near it are wrong"))
    return rows


def pause(failure: Mapping[str, Any], interval_s: float) -> str:
    """How long a failure stopped training, as exactly as it is known."""
    pause_s: float | None = failure["pause_s"]
    if pause_s is None:
        return "did not go on"
    return f"< {duration(interval_s)}" if pause_s < interval_s else duration(pause_s)


def duration(seconds: float) -> str:
    """In two units at most."""
    if seconds < 60.0:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:.0f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def _range(least_most: list[int]) -> str:
    least, most = least_most
    return str(most) if least == most else f"{least} to {most}"
