"""The dashboard and the alerts in deploy/monitoring name metrics that exist, and every alert says what to do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, ProcessCollector
from typer.main import get_command

from psa_store.cli.app import app
from psa_store.observe.metrics import METRICS, Kind

FOLDER = Path(__file__).parents[2] / "deploy" / "monitoring"
OURS = {f"psa_{metric.name}{'_total' if metric.kind is Kind.COUNTER else ''}" for metric in METRICS}
LABELS = {"job", "member", "role", "instance"}
COMING = {"checkpoint"}
"""Commands that alerts name and that may be newer than this checkout's `psa`."""

DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana.json").read_text())
GROUPS: list[dict[str, Any]] = yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"]
ALERTS = [rule for group in GROUPS for rule in group["rules"]]
TARGETS = [target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])]
EXPRESSIONS = [rule["expr"] for rule in ALERTS] + [target["expr"] for target in TARGETS]


OF_ANY_PROCESS = {family.name for family in ProcessCollector(registry=CollectorRegistry()).collect()}


def named(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:psa|process)_[a-z_]+\b", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_metrics_that_exist_and_at_least_one(expression: str) -> None:
    assert named(expression) and named(expression) <= OURS | OF_ANY_PROCESS


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_groups_and_selects_by_labels_that_exist(expression: str) -> None:
    lists = re.findall(r"\b(?:by|on|without|ignoring) ?\(([^)]*)\)", expression)
    used = {label.strip() for each in lists for label in each.split(",")}
    used |= {label for each in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)=", each)}
    assert used <= LABELS
    assert expression.count("(") == expression.count(")")


def test_rates_are_of_counters_and_changes_of_gauges() -> None:
    counters = {f"psa_{metric.name}_total" for metric in METRICS if metric.kind is Kind.COUNTER}
    for expression in EXPRESSIONS:
        assert set(re.findall(r"\b(?:rate|increase)\((\w+)", expression)) <= counters
        assert not set(re.findall(r"\b(?:changes|delta)\((\w+)", expression)) & counters


def test_every_metric_is_on_the_dashboard() -> None:
    shown = set().union(*(named(target["expr"]) for target in TARGETS))
    # The step of a worker is the version of its servers.
    assert OURS - shown == {"psa_step"}


def test_panels_are_told_apart_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = [
        (panel["gridPos"]["x"] + dx, panel["gridPos"]["y"] + dy)
        for panel in panels
        for dx in range(panel["gridPos"]["w"])
        for dy in range(panel["gridPos"]["h"])
    ]
    assert len(set(places)) == len(places) and max(x for x, _ in places) < 24
    assert all(panel["description"] for panel in panels if panel["type"] != "row")


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happened_and_which_command_to_run(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    told = rule["annotations"]
    assert told["summary"].endswith(".") and set(re.findall(r"\$labels\.(\w+)", str(told))) <= LABELS
    commands = re.findall(r"`psa ([a-z]+)", told["runbook"])
    assert commands and set(commands) <= set(get_command(app).commands) | COMING  # type: ignore[attr-defined]


def test_names_of_alerts_are_their_own() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)


def test_the_example_loads_the_alerts_and_keeps_our_label_of_the_job() -> None:
    example = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    assert all((FOLDER / name).is_file() for name in example["rule_files"])
    assert all(scrape["honor_labels"] is True for scrape in example["scrape_configs"])
