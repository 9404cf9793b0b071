"""What `psa run` prints and keeps of its processes, what they are called, and how they begin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
import pytest

from tests.harness import PATIENCE_S, PSA, TRAIN, Run, Site

SCRIPT = """
import os
import random
import signal
import sys
from pathlib import Path
import numpy as np
import torch
import psa_store as psa

job, die = sys.argv[1], Path(sys.argv[2])
print("begins with", random.random(), np.random.rand(), torch.rand(()).item(), list({"a", "b", "c", "d"}))
for index in range(200):
    print("out", index, end=" ")
    print("x" * 50)
    sys.stderr.write("error")
    sys.stderr.write(f" {index}\\n")
for percent in range(101):
    print(f"\\r{percent:3d}%", end="", file=sys.stderr, flush=True)
print(file=sys.stderr)

torch.manual_seed(3)
model = torch.nn.Linear(4, 1)
data = [(torch.randn(4), torch.randn(1)) for _ in range(16)]
with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=30) as worker:
    for x, y in worker.batches(data, batch_size=8):
        if worker.version == 15 and worker.rank == 1 and not die.exists():
            die.touch()
            print("dies with half a line", end="", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        torch.nn.functional.mse_loss(model(x), y).backward()
        worker.step()
print("ends", __name__, sys.argv[3:])
"""
LABELLED = re.compile(r"\[((?:worker|server)-\d)\] (.*)")


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "pack" / "train.py"
    path.parent.mkdir()
    (path.parent / "__init__.py").touch()
    path.write_text(SCRIPT)
    return path


def psa_run(site: Site, *arguments: object) -> subprocess.CompletedProcess[str]:
    # Executed: what sets the hash seed of all processes is not set here.
    without = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    return subprocess.run(
        [*PSA, "run", *map(str, arguments)],
        env={**without, **site.env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


def by_process(lines: Iterable[str]) -> dict[str, list[str]]:
    """The lines of each process; what has no label is the supervisor's."""
    found: dict[str, list[str]] = {}
    for line in lines:
        name, text = fit.groups() if (fit := LABELLED.fullmatch(line)) else ("supervisor", line)
        found.setdefault(name, []).append(text)
    return found


def test_lines_are_whole_and_say_whose_they_are_also_of_a_worker_that_was_killed(
    site: Site, script: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "logs"
    done = psa_run(site, "--log-dir", folder, script, "labels", tmp_path / "died", "--an-option", "1")
    assert done.returncode == 0, done.stderr
    out, error = by_process(done.stdout.splitlines()), by_process(done.stderr.splitlines())
    assert set(out) == {"worker-1", "worker-2"} and set(error) == {"worker-1", "worker-2", "server-1", "supervisor"}
    printed = [f"out {index} {'x' * 50}" for index in range(200)]
    for name, lines in out.items():
        starts = 2 if "dies with half a line" in lines else 1
        assert [line for line in lines if line.startswith("out")] == printed * starts, name
        assert lines[-1] == "ends __main__ ['--an-option', '1']", "arguments after the script are its own"
        errors = [line for line in error[name] if line.startswith("error")]
        assert errors == [f"error {index}" for index in range(200)] * starts, name
        bars = [line for line in error[name] if line.endswith("%")]
        assert bars[-1] == "100%" and len(bars) < 100, "a progress bar is not shown in each of its states"
        kept = (folder / f"{name}.log").read_text()
        assert kept.count("out 7 ") == starts and kept.count("error 7\n") == starts and kept.count("  9%") == starts
    assert sum("dies with half a line" in lines for lines in out.values()) == 1
    assert f"{folder}/worker-1.log" in error["supervisor"][0]
    assert "serving" in (folder / "server-1.log").read_text()
    assert len({line for lines in out.values() for line in lines if line.startswith("begins with")}) == 1


def test_streams_that_go_to_one_place_keep_their_order(site: Site, script: Path, tmp_path: Path) -> None:
    done = site.told("run", script, "order", tmp_path, merged=True)
    assert done.returncode == 0, done.stdout
    for lines in by_process(done.stdout.splitlines()).values():
        mine = [line.replace(" " + "x" * 50, "") for line in lines if line.startswith(("out", "error"))]
        assert mine in ([], [f"{kind} {index}" for index in range(200) for kind in ("out", "error")])


def test_one_worker_has_no_label_and_programs_get_none(site: Site, script: Path, tmp_path: Path) -> None:
    for name, flags in [("single", ["--workers", "1"]), ("plain", ["--no-label"]), ("json", ["--log-json"])]:
        done = site.told("run", *flags, script, name, tmp_path)
        assert done.returncode == 0, done.stderr
        assert set(by_process([*done.stdout.splitlines(), *done.stderr.splitlines()])) == {"supervisor"}


def test_a_module_is_run_as_python_runs_it(site: Site, script: Path, tmp_path: Path) -> None:
    arguments = ("run", "--workers", 1, "-m")
    done = site.told(*arguments, "pack.train", "module", tmp_path, "-m", "x", folder=script.parents[1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ends __main__ ['-m', 'x']"
    missing = site.told(*arguments, "pack.trian", "module", tmp_path, folder=script.parents[1])
    assert missing.returncode == 2 and "Traceback" not in missing.stderr
    assert f"no module pack.trian in {script.parents[1]}, nor in what is installed" in missing.stderr


def test_processes_are_called_what_they_are(site: Site) -> None:
    # Executed: one that was forked with another environment finds no room for its title.
    run = Run(["run", "--workers", "2", str(TRAIN), "--job", "titled", "--steps", "100000"], site.env)
    run.wait_for_step(1)
    main = psutil.Process(run.process.pid)
    titles = {" ".join(each.cmdline()).strip() for each in [main, *main.children(recursive=True)]}
    wanted = {f"psa: {what} of job titled" for what in ("supervisor", "worker 1", "worker 2", "server 1")}
    assert wanted | {"psa: fork server"} <= titles, titles
    run.kill()


def test_a_run_leaves_when_nothing_reads_it_any_more(site: Site) -> None:
    arguments = [*PSA, "run", str(Path("chaos") / "train.py"), "--job", "unread", "--steps", "1000000"]
    with subprocess.Popen(
        arguments, env={**os.environ, **site.env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(PATIENCE_S) == 0
    rest = site.psa("status", "unread")
    assert rest.finish() == 0 and "at rest" in rest.output


def test_a_worker_by_hand_begins_as_those_of_a_run_do(site: Site, tmp_path: Path) -> None:
    script = tmp_path / "begin.py"
    script.write_text("import random, torch\nprint(random.random(), torch.rand(()).item(), list({'a', 'b', 'c'}))\n")

    def said(*command: str, env: Mapping[str, str]) -> str:
        return subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE_S, check=True
        ).stdout.removeprefix("[worker-1] ")

    env = {**{name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}, **site.env}
    by_hand = said(*PSA, "worker", str(script), env=env)
    assert by_hand == said(*PSA, "run", "--workers", "1", str(script), env=env) != ""
    assert said(sys.executable, str(script), env=env) != by_hand, "plain python begins as it likes"
