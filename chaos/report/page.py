"""The page: verdicts, recovery times by kind of fault, and how to play each run again. One file, no outside fetches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from html import escape
from statistics import median
from string import Template

import numpy as np

from chaos.check import CHECKS, Recovery
from chaos.faults import FAULTS
from chaos.report.run import Run

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>psa chaos: $title</title>
<style>
:root { color-scheme: light dark; --line: #8884; --good: #0a7d4f; --bad: #c62828; }
@media (prefers-color-scheme: dark) { :root { --good: #4cc38a; --bad: #ff6b6b; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { width: 100%; background: white; border-radius: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; } .good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
code { font-size: .9em; white-space: nowrap; }
</style></head><body>
<h1>psa chaos: $title</h1>
<p class="$mood">$summary</p>
$picture
<h2>Recovery by kind of fault</h2>
<p>Seconds from the fault to the next completed step after the longest pause; 0 where training did not pause. The last
columns: the longest gap between two steps, less a normal one; by how much it exceeds the time that the fault itself
lasted; and the 95th percentile of the gaps around the fault, in normal steps.</p>
<div class="scroll"><table><tr><th>fault</th><th>what happens</th><th class="n">fired</th><th class="n">median</th>
<th class="n">p95</th><th class="n">max</th><th class="n">pause, max</th><th class="n">beyond the outage, max</th>
<th class="n">step gaps, p95 / normal</th></tr>
$recoveries</table></div>
<h2>Runs</h2>
<div class="scroll"><table><tr><th>scenario</th><th class="n">seeds</th>$heads<th class="n">faults</th>
<th class="n">goodput</th><th>play it again</th></tr>
$runs</table></div>
$violations
</body></html>
""")


def page(runs: Sequence[Run], longest: Run | None, picture: str) -> str:
    """All of it as text. ``picture``: a PNG of ``longest``, in base64."""
    broken = [run for run in runs if run.verdict.violations]
    faults = sum(len(run.verdict.recoveries) for run in runs)
    title = longest.name if longest is not None and len(runs) == 1 else f"{len(runs)} runs"
    summary = f"{len(runs)} runs, {faults} faults: " + (
        f"{len(broken)} runs broke a promise." if broken else "every promise was kept in every run."
    )
    shown = ""
    if longest is not None:
        text = escape(f"{longest.name}, seed {longest.seed}")
        shown = f'<p><img alt="loss, versions and faults of {text}" src="data:image/png;base64,{picture}"></p>'
    return _PAGE.substitute(
        title=escape(title),
        mood="bad" if broken else "good",
        summary=escape(summary),
        picture=shown,
        recoveries="\n".join(_recovery_rows(each for run in runs for each in run.verdict.recoveries)),
        heads="".join(f"<th>{escape(check.replace('_', ' '))}</th>" for check in CHECKS),
        runs="\n".join(_run_rows(runs)),
        violations=_violations(broken),
    )


def _recovery_rows(recoveries: Iterable[Recovery]) -> Iterable[str]:
    by_kind: dict[str, list[Recovery]] = defaultdict(list)
    for recovery in recoveries:
        by_kind[recovery.kind].append(recovery)
    for kind, found in sorted(by_kind.items()):
        times = [each.recovery_s for each in found]
        numbers = [f"{median(times):.2f}", f"{np.quantile(times, 0.95):.2f}", f"{max(times):.2f}"]
        numbers.append(f"{max(each.pause_s for each in found):.2f}")
        numbers.append(f"{max(max(0.0, each.pause_s - each.outage_s) for each in found):.2f}")
        numbers.append(f"{median(each.gap_ratio for each in found):.1f}")
        what = FAULTS[kind].what if kind in FAULTS else ""
        cells = "".join(f'<td class="n">{number}</td>' for number in [str(len(found)), *numbers])
        yield f"<tr><td>{escape(kind)}</td><td>{escape(what)}</td>{cells}</tr>"


def _run_rows(runs: Sequence[Run]) -> Iterable[str]:
    by_name: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        by_name[run.name].append(run)
    for name, same in by_name.items():
        cells = []
        for check in CHECKS:
            failed = [run.seed for run in same if any(each.check == check for each in run.verdict.violations)]
            cells.append(f'<td class="bad">seeds {failed}</td>' if failed else '<td class="good">ok</td>')
        seeds = f"{same[0].seed}" if len(same) == 1 else f"{same[0].seed}-{same[-1].seed} ({len(same)})"
        faults = sum(len(run.verdict.recoveries) for run in same)
        useful = median(run.verdict.goodput for run in same)
        yield (
            f'<tr><td>{escape(name)}</td><td class="n">{seeds}</td>{"".join(cells)}<td class="n">{faults}</td>'
            f'<td class="n">{useful:.0%}</td><td><code>{escape(same[0].replay)}</code></td></tr>'
        )


def _violations(broken: Sequence[Run]) -> str:
    if not broken:
        return ""
    rows = [
        f"<tr><td>{escape(run.name)}</td><td class='n'>{run.seed}</td><td>{escape(each.check)}</td>"
        f"<td>{escape(each.message)}</td></tr>"
        for run in broken
        for each in run.verdict.violations
    ]
    head = "<tr><th>scenario</th><th class='n'>seed</th><th>check</th><th>what was seen</th></tr>"
    return f'<h2 class="bad">Broken promises</h2><div class="scroll"><table>{head}{"".join(rows)}</table></div>'
