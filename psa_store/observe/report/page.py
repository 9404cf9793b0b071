"""The page: the picture, the numbers, every failure and every checkpoint. One file that asks for nothing. Pure."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from html import escape
from string import Template
from typing import Any

from psa_store.observe.formatting import date, duration
from psa_store.observe.report.run import Run
from psa_store.observe.report.summary import GOODPUT, facts, pause

_PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$job: report of psa</title>
<style>
:root { color-scheme: light dark; --line: #8884; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --quiet: #aaa; } img { filter: invert(.92) hue-rotate(180deg); } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2rem; }
img { width: 100%; height: auto; border-radius: 6px; } .quiet { color: var(--quiet); font-size: .9em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n, th.n { text-align: right; } td.t { white-space: nowrap; }
</style></head><body>
<h1>$job</h1>
<p class="quiet">$begin to $end</p>
<table id="facts">$facts</table>
<p class="quiet">$goodput</p>
<p><img alt="loss, throughput, members and versions of $job over time" src="data:image/png;base64,$picture"></p>
<h2>Failures</h2>
$failures
<h2>Rollbacks</h2>
$rollbacks
<h2>Checkpoints</h2>
$checkpoints
</body></html>
""")


def page(run: Run, picture: bytes) -> str:
    """All of it as text. ``picture``: a PNG."""
    failures = [
        (number, date(each.time), each.what, pause(each, run.interval_s), each.computed_again, each.text)
        for number, each in enumerate(run.failures, 1)
    ]
    rollbacks = [(date(each.time), each.version, each.lost, each.text) for each in run.rollbacks]
    checkpoints = [
        (each.name, each.version, date(each.time), each.reason, f"{each.bytes / 1e6:,.1f}") for each in run.checkpoints
    ]
    resolution = f"A pause is known to about {duration(run.interval_s)}, the time between two points of the curve."
    return _PAGE.substitute(
        job=escape(run.job),
        begin=date(run.begin),
        end=date(run.end),
        facts="".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts(run)),
        goodput=escape(GOODPUT),
        picture=base64.b64encode(picture).decode(),
        failures=_table(
            "failures",
            ("#no.", "time", "what", "pause", "#computed again", "as the controller noted it"),
            failures,
            f'<p class="quiet">{escape(resolution)}</p>',
        ),
        rollbacks=_table("rollbacks", ("time", "#to version", "#versions left behind", ""), rollbacks),
        checkpoints=_table("checkpoints", ("name", "#version", "taken", "why", "#MB"), checkpoints),
    )


def _table(name: str, heads: Iterable[str], rows: list[tuple[Any, ...]], note: str = "") -> str:
    """A head that begins with # is that of numbers."""
    if not rows:
        return '<p class="quiet">none</p>'
    numeric = [head.startswith("#") for head in heads]
    head = "".join(_cell("th", text.removeprefix("#"), n) for text, n in zip(heads, numeric, strict=True))
    body = "".join(
        "<tr>" + "".join(_cell("td", value, n) for value, n in zip(row, numeric, strict=True)) + "</tr>" for row in rows
    )
    return f'{note}<div class="scroll"><table id="{name}"><tr>{head}</tr>{body}</table></div>'


def _cell(tag: str, value: Any, numeric: bool) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return f"<{tag}{' class=n' if numeric else ''}>{escape(text)}</{tag}>"
