"""A campaign: many runs one after another, each checked at once, and one report of all of them."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from rich.console import Console

from chaos.check import Verdict, check_history
from chaos.cluster.network import namespaces_available
from chaos.history import Reference, read_history, reference_of
from chaos.job import JobSpec, SupervisedJob
from chaos.report import Run, write_report
from chaos.run import RunSpec, replay_command, run_once
from chaos.scenarios import MATRIX, SOAK, Scenario, Shape, scenario
from chaos.schedule import ScheduledFault, long_schedule, pace_s
from chaos.site import Site, open_site
from psa_store.errors import PsaError, UsageError
from psa_store.job.mode import parse_mode

PACE_S = 0.012
"""The least time that a rank computes in a step: about half of an undisturbed step."""
_STEPS_PER_S = 18.0
"""Of a long run. With more the run without faults, which comes first, would take longer."""
_ROW = "{:<28} {:>4}  {:<4} {:<4} {:>6}  {:>8}  {}"


@dataclass(frozen=True, slots=True)
class Campaign:
    """What to run."""

    names: Sequence[str]
    seeds: Sequence[int]
    duration_s: float | None
    every_s: float
    folder: Path
    keep: bool
    """Keep the journals of runs without violations, too."""


class ChaosFound(PsaError):
    """A promise was broken, or a fault did not happen; the report says which."""


def rows_of(names: Sequence[str]) -> list[Scenario]:
    """Return the scenarios of some names; ``all`` is the matrix without those that set the clock of the machine."""
    if list(names) == ["all"]:
        return [row for row in MATRIX.values() if not row.sets_clock]
    return [scenario(name) for name in names]


def playable(rows: Sequence[Scenario]) -> Sequence[Scenario]:
    """Return the same rows; raise UsageError if this machine cannot play one of them."""
    needy = [row.name for row in rows if row.shape is Shape.HOSTS or row.small_disk]
    reason = namespaces_available()
    if needy and reason is not None:
        raise UsageError(f"{reason}, which these scenarios need: {', '.join(needy)}. Name others, or become root.")
    return rows


def run_campaign(campaign: Campaign) -> None:
    """Run, check, report.

    Raises:
        ChaosFound: a promise was broken, or a fault did not happen.
        UsageError: there is no such scenario, or this machine cannot play it.
    """
    rows = playable(rows_of(campaign.names))
    console = Console(highlight=False)
    console.print(f"journals and report: {campaign.folder}")
    runs: list[Run] = []
    references: dict[tuple[int, int, str], Reference] = {}
    console.print(_ROW.format("scenario", "seed", "A", "B", "faults", "R max, s", "verdict"))
    try:
        for kind, group in groupby(sorted(rows, key=_kind_of_site), key=_kind_of_site):
            rows_here = list(group)
            with open_site(rows_here[0], campaign.folder / f"site-{kind}") as site:
                for spec in (_run_spec(campaign, row, seed) for row in rows_here for seed in campaign.seeds):
                    what = spec.job.steps, spec.job.stages, spec.job.mode
                    if what not in references:
                        references[what] = undisturbed(site, *what, campaign.folder)
                    runs.append(_one(spec, site, references[what], campaign.keep))
                    console.print(_line(runs[-1]))
                    first_of_each = {each.check: each for each in reversed(runs[-1].verdict.violations)}
                    for violation in first_of_each.values():
                        console.print(f"    {violation.check}: {violation.message}")
    finally:  # report what was played, whatever ended the campaign
        write_report(runs, campaign.folder)
        console.print(f"report: {campaign.folder / 'report.html'}")
    broken = [run for run in runs if run.verdict.violations]
    if broken:
        first = broken[0]
        raise ChaosFound(
            f"{len(broken)} of {len(runs)} runs broke a promise, first {first.name} with seed {first.seed}; "
            f"play it again: {first.replay}"
        )


def undisturbed(site: Site, steps: int, stages: int, mode: str, folder: Path) -> Reference:
    """Run without faults, with one worker and one server, and return what other runs are compared with."""
    name = f"undisturbed-{steps}-{stages}-{mode.partition(':')[0]}"
    job_spec = JobSpec(name, steps, 0.0, folder / name, stages=stages, mode=mode)
    for each in (job_spec.journals, job_spec.failpoints):
        each.mkdir(parents=True, exist_ok=True)
    job = SupervisedJob(job_spec, site, workers=1, servers=1)
    try:
        job.start()
        code = job.wait()
    finally:
        job.kill()
    if code != 0:
        raise UsageError(f"the undisturbed run failed with exit code {code}; see {job_spec.log}")
    final = site.digest(job_spec.name, job_spec.last_version)
    return reference_of(read_history(job_spec.journals), final, parse_mode(mode))


def _run_spec(campaign: Campaign, row: Scenario, seed: int) -> RunSpec:
    schedule: list[ScheduledFault]
    extra: list[str] = []
    steps = row.steps
    if campaign.duration_s is None and row is not SOAK:
        schedule = row.schedule(seed)
    else:
        duration_s = campaign.duration_s or 600.0
        schedule = long_schedule(row.kinds, row.name, seed, duration_s, campaign.every_s)
        steps = round(duration_s * _STEPS_PER_S)
        extra = ["--duration", f"{duration_s:g}s", "--every", f"{campaign.every_s:g}s"]
    folder = campaign.folder / f"{row.name}-{seed}"
    name = f"{row.name}-{seed}".replace(".", "-")
    env = {} if row.checkpoint_every_s is None else {"PSA_CHECKPOINT_EVERY_S": str(row.checkpoint_every_s)}
    pace = pace_s(schedule, steps, PACE_S)
    job_spec = JobSpec(name, steps, pace, folder, env, row.commit_every, row.stages, row.mode)
    return RunSpec(row, seed, schedule, job_spec, replay_command(row.name, seed, extra))


def _one(spec: RunSpec, site: Site, reference: Reference, keep: bool) -> Run:
    folder = spec.job.folder
    shutil.rmtree(folder, ignore_errors=True)
    run_once(spec, site)
    read = read_history(spec.job.journals)
    verdict = check_history(read, reference)
    long = spec.job.steps > spec.scenario.steps
    if not (keep or long or verdict.violations):
        shutil.rmtree(folder)
    history = read if long or keep or verdict.violations else None
    return Run(spec.scenario.name, spec.seed, spec.replay, history, verdict)


def _line(run: Run) -> str:
    verdict: Verdict = run.verdict
    broken = {violation.check for violation in verdict.violations}
    recoveries = [each.recovery_s for each in verdict.recoveries]
    return _ROW.format(
        run.name,
        run.seed,
        "-" if "exactly_once" in broken else "ok",
        "-" if "bits" in broken else "ok",
        len(recoveries),
        f"{max(recoveries):.2f}" if recoveries else "",
        "ok" if not broken else f"BROKEN: {', '.join(sorted(broken))}",
    )


def _kind_of_site(row: Scenario) -> str:
    """Rows of one kind share a cluster."""
    return f"{row.shape.name.lower()}{'-small' if row.small_disk else ''}"
