"""`psa bench`: small comparisons end, write what was asked for, judge honestly and leave nothing behind."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from psa_store.bench.chart import check_matplotlib
from psa_store.bench.children import CommandPipe
from psa_store.bench.curve import curves
from psa_store.bench.names import FLOOR, GLOO, PSA, PSA_TCP, RPC, RPC_PIECES, STREAM
from psa_store.bench.request import Rule
from psa_store.bench.results import Comparison, Match, Series
from psa_store.bench.targets import targets
from psa_store.bench.update import Update, mean_scale
from psa_store.bench.workload import Workload
from psa_store.errors import UsageError, UserCodeFailed
from tests.harness import Run

MARK = "PSA_BENCH_TEST"
PATIENCE_S = 120.0
SMALL = ("--megabytes", "1", "--rounds", "2", "--steps", "2")
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name is short enough for the Unix sockets that commands put into their temporary folders."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


@pytest.fixture
def env(short: Path) -> Iterator[dict[str, str]]:
    """An environment whose processes can be told apart; when the command is done, none may be left, and no file."""
    mark, folder = secrets.token_hex(8), short / "tmp"
    folder.mkdir()
    yield {MARK: mark, "TMPDIR": str(folder)}
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    # The fork server ends by itself, a moment after the command.
    while left := marked(mark):
        assert time.monotonic() < end_s, f"left behind: {left}"
        pause.wait(0.02)
    assert not list(folder.iterdir())


def marked(mark: str) -> list[str]:
    """Command lines of living processes with this mark in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and f"{MARK}={mark}".encode() in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            pass
    return found


def named(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in rows}


def test_all_contenders_take_steps_and_prove_them(env: dict[str, str], tmp_path: Path) -> None:
    document_path, png_path = tmp_path / "bench.json", tmp_path / "bench.png"
    run = Run(["bench", *SMALL, "--workers", "2", "--json", str(document_path), "--png", str(png_path)], env)
    assert run.finish() == 0, run.output
    document = json.loads(document_path.read_text())
    assert document["bytes"] == 1_000_000 and document["optimizer"] == "sgd" and document["steps_per_block"] == 2
    (match,) = document["matches"]
    contenders = named(match["contenders"])
    assert {PSA, PSA_TCP, GLOO, RPC, RPC_PIECES, FLOOR} <= contenders.keys()
    for each in contenders.values():
        assert len(each["blocks_ms"]) == 2 and each["median_ms"] > 0
    assert contenders[PSA]["ratio"] == 1.0
    assert contenders[GLOO]["ratio"] == pytest.approx(contenders[PSA]["median_ms"] / contenders[GLOO]["median_ms"])
    assert named(match["limits"])[STREAM]["median_bytes_per_s"] > 0 and match["tcp_share_of_stream"] > 0
    assert match["targets"] == []  # they are for 100 MB
    assert png_path.read_bytes().startswith(PNG_MAGIC)
    assert GLOO in run.output and "targets" not in run.output


def test_the_cost_of_added_workers(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "curve.json"
    asked = [
        "--workers",
        "1,2",
        "--workers",
        "3",
        "--no-peers",
        "--no-limits",
        "--carrier",
        "shared",
        "--json",
        str(path),
    ]
    run = Run(["bench", *SMALL, "--optimizer", "adamw", "--clip", "1", *asked], env)
    assert run.finish() == 0, run.output
    (curve,) = json.loads(path.read_text())["curves"]
    assert curve["name"] == PSA and list(curve["ms_by_workers"]) == ["1", "2", "3"]
    assert "per added worker" in run.output and GLOO not in run.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_cleans_up(env: dict[str, str], number: signal.Signals) -> None:
    run = Run(["bench", *SMALL, "--workers", "2", "--rounds", "1000", "--no-limits"], env)
    run.wait_for_line(lambda line: "round 1 of" in line)
    os.killpg(run.process.pid, number) if number is signal.SIGINT else run.process.send_signal(number)
    assert run.finish() == 130, run.output
    assert "Traceback" not in run.output


def test_a_child_that_fails_after_the_benchmark_has_ended_says_nothing() -> None:
    """When the benchmark is interrupted its servers end first, and what its workers say then has no reader."""
    ours, its = multiprocessing.Pipe()
    ours.close()
    with pytest.raises(SystemExit) as ended:
        CommandPipe(its).fail("the server is gone")
    assert ended.value.code == 0
    its.close()


def test_a_killed_run_leaves_no_process(short: Path) -> None:
    mark = secrets.token_hex(8)
    run = Run(
        ["bench", *SMALL, "--workers", "2", "--rounds", "1000", "--no-limits"], {MARK: mark, "TMPDIR": str(short)}
    )
    run.wait_for_line(lambda line: "round 1 of" in line)
    run.process.kill()
    pause, end_s = threading.Event(), time.monotonic() + PATIENCE_S
    while left := marked(mark):
        assert time.monotonic() < end_s, f"left behind: {left}"
        pause.wait(0.02)


@pytest.mark.parametrize(
    "arguments",
    [["--workers", "two"], ["--workers", "2,2"], ["--workers", "0"], ["--clip", "0"], ["--png", "/nowhere/bench.png"]],
)
def test_what_cannot_be_measured_is_refused_at_once(env: dict[str, str], arguments: list[str]) -> None:
    run = Run(["bench", *arguments], env)
    assert run.finish() == 2
    assert "is ready" not in run.output


def test_a_picture_needs_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        check_matplotlib()


@pytest.mark.parametrize("rule", list(Rule))
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_contender_that_does_less_work_is_found(rule: Rule, clip: float | None) -> None:
    workload, steps = Workload(5000, 3, rule, clip), 7
    parameter = torch.zeros(workload.elements, requires_grad=True)
    optimizers = {Rule.SGD: torch.optim.SGD, Rule.ADAMW: torch.optim.AdamW}

    def trained(ranks: int, steps: int) -> torch.Tensor:
        parameter = torch.zeros(workload.elements, requires_grad=True)
        optimizer = optimizers[rule]([parameter], lr=workload.lr)
        for _ in range(steps):
            parameter.grad = torch.stack([workload.gradient(rank) for rank in range(ranks)]).mean(dim=0)
            if clip is not None:
                torch.nn.utils.clip_grad_norm_([parameter], clip)
            optimizer.step()
        return parameter.detach()

    workload.check(trained(3, steps).split(1000), steps)
    for wrong in (trained(2, steps), trained(3, steps - 1), trained(3, steps)[:-1], parameter):
        with pytest.raises(UserCodeFailed):
            workload.check([wrong], steps)


def test_the_clip_factor_of_a_large_gradient_is_as_exact_as_adamw_needs() -> None:
    """Where a gradient is as small as EPS, an error of the norm shows in the parameter."""
    workload, steps = Workload(25_000_000, 1, Rule.ADAMW, 1.0), 20
    scale = mean_scale(workload, [workload.gradient(0)], 1)
    few = Workload(2_000, 1, Rule.ADAMW, 1.0)
    parameters = torch.zeros(few.elements)
    update = Update(few, parameters)
    for _ in range(steps):
        update.apply(few.gradient(0), scale)
    with pytest.raises(UserCodeFailed, match="parameters instead of"):  # all of these are right, the rest is missing
        workload.check([parameters], steps)


def match_of(workers: int, **times_s: float) -> Match:
    """A match of 100 MB in which contenders need the same time in each of three rounds."""
    names = {"psa": PSA, "gloo": GLOO, "stream": STREAM, "tcp": PSA_TCP}
    series = [Series(names[key], (time_s,) * 3) for key, time_s in times_s.items()]
    return Match(
        Workload(25_000_000, workers, Rule.SGD),
        tuple(each for each in series if each.name != STREAM),
        tuple(each for each in series if each.name == STREAM),
    )


def test_targets_are_held_against_ratios_of_medians() -> None:
    (two,), (four,) = (targets(match_of(workers, psa=0.03, gloo=0.1)) for workers in (2, 4))
    assert (two.found, two.met) == (pytest.approx(0.3), True)
    assert (four.at_most, four.met) == (0.25, False)


def test_bytes_of_both_directions_count() -> None:
    match = match_of(2, psa=0.03, tcp=0.2, stream=0.05)
    tcp = match.find(PSA_TCP)
    assert tcp is not None and match.share_of_stream(tcp) == pytest.approx((2 * 2 * 0.1 / 0.2) / (0.1 / 0.05))


@pytest.mark.parametrize(("quadratic_s", "bends"), [(0.0, False), (0.002, True)])
def test_a_curve_tells_a_line_from_a_parabola(quadratic_s: float, bends: bool) -> None:
    matches = tuple(match_of(n, psa=0.01 + 0.003 * n + quadratic_s * n * n) for n in (8, 2, 3, 4, 6))
    (curve,) = curves(Comparison(matches, {}, steps=5))
    assert [workers for workers, _ in curve.points] == [2, 3, 4, 6, 8]
    assert curve.bend_s == pytest.approx(2 * quadratic_s, abs=1e-9)
    assert curve.bends_up is bends
