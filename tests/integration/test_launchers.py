"""A script started by other means than `psa run`: plain `python` and torchrun, beside the servers of `psa up`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from psa_store.launch import down, up
from tests.harness import PATIENCE_S, Run, Site

SCRIPT = r"""
import os
import sys
import time
import torch
import psa_store as psa

job, meet, *ranks = sys.argv[1:]
torch.manual_seed(3)
model = torch.nn.Linear(4, 1)
data = [(torch.randn(4), torch.randn(1)) for _ in range(16)]
seen = set()
with psa.Worker(job, model, optimizer=psa.optim.SGD(lr=0.1), steps=30, **{"ranks": int(r) for r in ranks}) as worker:
    for x, y in worker.batches(data, batch_size=8):
        while worker.version == 10 and worker.members < int(meet):
            time.sleep(0.01)  # user code can only poll members; the test has a deadline
        if worker.version >= 20:
            seen.add(worker.rank)
        torch.nn.functional.mse_loss(model(x), y).backward()
        worker.step()
    # In one write: torchrun's processes are unbuffered, and a print() of two would mix its end with another line's.
    sys.stdout.write(f"ranks {worker.ranks}, computed {sorted(seen)} on {os.environ.get('RANK')}\n")
"""
SPEAKING = (
    """
import logging
import structlog
logging.basicConfig(level=logging.WARNING, format="mine: %(message)s")
structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
"""
    + SCRIPT
    + """
structlog.get_logger().debug("from the script")
logging.getLogger("mine").warning("a warning of the script")
logging.getLogger("mine").info("not shown")
"""
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A PSA_HOME in which `psa up` was typed."""
    folder = tmp_path_factory.mktemp("home")
    up(folder, 1)
    yield folder
    down(folder)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def python(*arguments: object, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )


@pytest.fixture
def served(site: Site, home: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    """`psa server` of a job named after the test, beside `psa up`; yields the name."""
    job = request.node.name.replace("[", "-").rstrip("]")
    server = Run(["server", "--job", job], {"PSA_HOME": str(home)}, spawner=site.spawner)
    yield job
    server.process.send_signal(signal.SIGTERM)
    assert server.finish() == 0, server.output


def test_a_plain_script_finds_what_up_started_and_leaves_the_log_of_the_script_alone(
    home: Path, script: Path, served: str
) -> None:
    script.write_text(SPEAKING)
    done = python(script, served, 1, env={"PSA_HOME": str(home)})
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ranks 1, computed [0] on None", "event='from the script'"]
    ours, theirs = done.stderr.splitlines()[:-1], done.stderr.splitlines()[-1]
    assert theirs == "mine: a warning of the script"
    assert any("job created" in line for line in ours)
    for line in ours:
        assert "[info" in line and "role=worker" in line, line


def test_without_servers_the_error_says_what_to_do(script: Path, tmp_path: Path) -> None:
    for env, unset in [({}, "PSA_REDIS and PSA_ZOOKEEPER are"), ({"PSA_REDIS": "redis://db"}, "PSA_ZOOKEEPER is")]:
        done = python(script, "none", 1, env={"PSA_HOME": str(tmp_path), **env})
        assert done.returncode == 1
        last = done.stderr.splitlines()[-1]
        assert f"no private servers run in {tmp_path}, and {unset} not set: `psa up` starts" in last


def test_a_reader_finds_what_up_started(home: Path, script: Path, served: str) -> None:
    assert python(script, served, 1, env={"PSA_HOME": str(home)}).returncode == 0
    reader = "import sys, psa_store as psa; print(psa.Store(sys.argv[1]).version())"
    done = python("-c", reader, served, env={"PSA_HOME": str(home)})
    assert done.stdout.strip() == "30", done.stderr


def torchrun(home: Path, script: Path, *arguments: object, **env: str) -> list[str]:
    """The lines that two processes of torchrun print."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = python(*launcher, script, *arguments, env={"PSA_HOME": str(home), **env})
    assert done.returncode == 0, done.stderr
    return sorted(done.stdout.splitlines())


def test_under_torchrun_its_world_size_is_the_number_of_ranks(home: Path, script: Path, served: str) -> None:
    lines = torchrun(home, script, served, 2)
    computed = [line.removeprefix("ranks 2, computed ") for line in lines]
    assert {line.partition(" on ")[0] for line in computed} == {"[0]", "[1]"}, lines
    assert {line.partition(" on ")[2] for line in computed} == {"0", "1"}, "one process each"


@pytest.mark.parametrize(
    ("arguments", "env"), [([1, 4], {}), pytest.param([1], {"PSA_RANKS": "4"}, marks=pytest.mark.long)]
)
def test_an_argument_and_a_setting_count_before_torchrun(
    home: Path, script: Path, served: str, arguments: list[int], env: dict[str, str]
) -> None:
    lines = torchrun(home, script, served, *arguments, **env)
    assert all(line.startswith("ranks 4, ") for line in lines), lines
