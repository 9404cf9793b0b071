"""`psa estimate` with real scripts: the example, one that has buffers, and scripts that misbehave."""

from __future__ import annotations

import json
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from psa_store.examples import gpt
from psa_store.job.layout import make_layout
from psa_store.optim import AdamW
from psa_store.worker.flat_model import describe_model
from tests.harness import Site

GPT = (str(Path(gpt.__file__)), "--width=32", "--layers=1")
TERMS = {"gradients travel", "servers: reduce, update", "parameters travel", "messages", "copies for commits"}


def plan(site: Site, folder: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `psa estimate` with nothing of ours in its environment but ``env``."""
    return site.told("estimate", *arguments, env={"PSA_HOME": str(folder / "home"), **env}, folder=folder, only=True)


def planned(site: Site, folder: Path, *arguments: str, **env: str) -> dict[str, Any]:
    done = plan(site, folder, "--json", *arguments, **env)
    assert done.returncode == 0, done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.fixture
def script(tmp_path: Path) -> Path:
    return tmp_path / "script.py"


def test_the_example_is_planned_without_redis_and_zookeeper(site: Site, tmp_path: Path) -> None:
    found = planned(site, tmp_path, "--workers", "3", "--servers", "2", "--ranks", "4", *GPT)
    options = gpt.parse_options(["--width=32", "--layers=1"])
    vocabulary = gpt.Vocabulary.of(gpt.load_text(None))
    layout = make_layout(describe_model(gpt.build_model(options, vocabulary), AdamW().group_of))
    assert (found["job"], found["mode"], found["ranks"]) == ("gpt", "sync", 4)
    assert (found["parameter_bytes"], found["shards"]) == (layout.arena_bytes, len(layout.shards))
    assert [len(worker["ranks"]) for worker in found["workers"]] == [2, 1, 1]
    assert sum(server["parameter_bytes"] for server in found["servers"]) == layout.arena_bytes
    sent = [sum(link["up_bytes"] for link in links) for links in found["ways"]["TCP"]["links"]]
    assert sent == [2 * layout.arena_bytes, layout.arena_bytes, layout.arena_bytes]
    assert found["redis"]["version_bytes"] == 3 * layout.arena_bytes == found["commit"]["bytes"]
    assert found["commit"]["seconds"] is None
    for way in found["ways"].values():
        assert way["terms"].keys() >= TERMS and way["step_seconds"] == pytest.approx(sum(way["terms"].values()))
    assert found["ways"]["TCP"]["terms"]["gradients travel"] > 0.0
    assert not (tmp_path / "home").exists(), "nothing is stored"


def test_people_get_tables_and_what_is_not_known(site: Site, tmp_path: Path) -> None:
    done = plan(site, tmp_path, "--compute-ms", "25", *GPT, "--mode=local:steps=5", PSA_COMPRESS="int8", COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "mode local:steps=5, 2 ranks, compression int8" in done.stdout
    assert "compute, as you say" in done.stdout and "25.00" in done.stdout and "ranks: own update" in done.stdout
    assert "shared memory" not in done.stdout, "in rounds everything is sent"
    assert "Redis was not measured: PSA_REDIS is not set" in done.stdout


def test_a_model_in_stages_is_planned_by_cells(site: Site, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    script = (str(root / "chaos" / "staged.py"), "--job=staged", "--steps=9", "--stages=4")
    options, paths = ("--workers=3", "--ranks=2"), {"PYTHONPATH": str(root)}
    found = planned(site, tmp_path, *options, *script, **paths)
    assert found["pipeline"] == {
        "stages": 4,
        "microbatches": 4,
        "bubble": pytest.approx(3 / 7),
        "cuts": 4,
        "carries": 32,
        "carry_bytes": None,
    }
    assert [len(worker["cells"]) for worker in found["workers"]] == [3, 3, 2]
    assert found["workers"][2]["cells"] == [{"rank": 0, "stage": 3}, {"rank": 1, "stage": 3}]
    assert 4 * found["workers"][2]["parameter_bytes"] == found["servers"][0]["parameter_bytes"]
    done = plan(site, tmp_path, *options, *script, COLUMNS="160", **paths)
    assert done.returncode == 0, done.stderr
    assert "2 ranks, 4 stages, 4 micro-batches, compression none" in done.stdout
    assert "each waits 43% of the time, 3 of 7 turns" in done.stdout
    assert "32 (2 x 4 micro-batches x 4 cuts)" in done.stdout and "stage 3 of ranks 0, 1" in done.stdout


def test_redis_is_measured_where_it_is_known_and_left_as_it_was(site: Site, tmp_path: Path) -> None:
    with closing(site.store()) as store:
        before = store.jobs()
    found = planned(site, tmp_path, *GPT, PSA_REDIS=site.redis)
    assert found["commit"]["seconds"] > 0.0 and found["speeds"]["redis_bytes_per_s"] > 1e6
    with closing(site.store()) as store:
        assert store.jobs() == before


def test_what_a_script_prints_does_not_get_into_the_document(site: Site, tmp_path: Path, script: Path) -> None:
    script.write_text(
        "import sys, torch, psa_store as psa\n"
        "print('hello', sys.argv[1:])\n"
        "try:\n"
        "    psa.Worker('j', torch.nn.BatchNorm1d(64), optimizer=psa.optim.SGD(lr=0.1))\n"
        "finally:\n"
        "    print('bye')\n"
        "raise AssertionError('it went on')\n"
    )
    done = plan(site, tmp_path, "--json", "script.py", "--steps", "9")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"] == "j"
    assert "hello ['--steps', '9']" in done.stderr and "bye" in done.stderr and "it went on" not in done.stderr


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("print('I train nothing')", 2, "script.py ended without making a psa.Worker"),
        ("raise ValueError('no data')", 1, "script.py ended with exit code 1 before it made a psa.Worker"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", 1, "script.py ended with signal 9"),
        ("import sys; sys.exit(7)", 1, "ended with exit code 7"),
        ("def main(): psa.Worker\n", 2, "see that it trains when run as a program"),
    ],
)
def test_scripts_that_make_no_worker(site: Site, tmp_path: Path, script: Path, text: str, code: int, said: str) -> None:
    script.write_text(text)
    done = plan(site, tmp_path, "script.py")
    assert done.returncode == code and done.stdout == ""
    assert said in done.stderr.splitlines()[-1] and done.stderr.splitlines()[-1].startswith("psa: ")


def test_a_job_that_cannot_be_is_refused_by_the_worker(site: Site, tmp_path: Path) -> None:
    done = plan(site, tmp_path, "--ranks", "2", *GPT, PSA_MODE="sync:backup=2")
    assert done.returncode == 1 and "a step needs at least one of 2 ranks" in done.stderr


def test_no_such_script(site: Site, tmp_path: Path) -> None:
    done = plan(site, tmp_path, "nowhere.py")
    assert done.returncode == 2 and done.stderr == "psa: no script nowhere.py\n"
