"""Redis is lost with everything in it: a run goes on from files, when it is told to, and never by itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from psa_store.launch import PrivateRedis, PrivateZooKeeper
from tests.harness import Run, Site
from tests.kill.test_checkpoints import STEPS, start, stored


@pytest.fixture
def own(tmp_path: Path) -> Iterator[tuple[Site, PrivateRedis]]:
    """A Redis that may be lost."""
    redis, zookeeper = PrivateRedis(tmp_path / "redis"), PrivateZooKeeper(tmp_path / "zookeeper")
    try:
        redis.start(120)
        zookeeper.start(120)
        yield Site(redis.url, zookeeper.hosts, tmp_path), redis
    finally:
        redis.stop()
        zookeeper.stop()


def lose(redis: PrivateRedis, folder: Path) -> None:
    redis.stop()
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each)
        elif each.name != "port":
            each.unlink()
    redis.start(120)


def test_all_of_redis_is_lost(own: tuple[Site, PrivateRedis], tmp_path: Path) -> None:
    site, redis = own
    undisturbed = start(site, "alone")
    assert undisturbed.finish() == 0, undisturbed.output
    bits = site.digest("alone", STEPS)

    files = tmp_path / "files"
    settings = {"PSA_CHECKPOINT_EVERY_S": "1", "PSA_CHECKPOINT_FILES": str(files), "PSA_CHECKPOINT_KEEP": "2"}
    run = start(site, "lost", slow_until=tmp_path / "never", **settings)
    for _ in range(4):  # each is said before old ones are removed, and after those before it were
        run.wait_for_line(lambda line: "checkpoint in files" in line)
    run.kill()
    folders = sorted(each for each in (files / "lost").iterdir() if (each / "psa.json").exists())
    assert len(folders) in (2, 3), "older ones are kept, or newer ones are not"
    lose(redis, tmp_path / "redis")

    again = start(site, "lost", **settings)
    assert again.finish() == 4, again.output
    assert "--restore" in again.output and folders[-1].name in again.output

    # The newest is torn: the one before it is used, and that is said.
    weights = folders[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    restored = start(site, "lost", PSA_RESTORE="1", **settings)
    line = restored.wait_for_line(lambda line: "restoring from files" in line)
    assert str(folders[-2]) in line
    assert any("passed over" in line and folders[-1].name in line for line in restored.lines)
    assert restored.finish() == 0, restored.output
    assert restored.output.count("restoring from files") == 1, (
        "only the process that holds the right to create reads files"
    )
    assert site.digest("lost", STEPS) == bits
    assert stored(site, "lost").checkpoints, "none was taken since"


def test_restoring_says_what_it_lacks(own: tuple[Site, PrivateRedis], tmp_path: Path) -> None:
    site, redis = own
    run: Run = start(site, "nothing", PSA_RESTORE="1")
    assert run.finish() == 2 and "PSA_CHECKPOINT_FILES" in run.output
    # The setting may stand in psa.toml: then it is no hindrance to a job that begins.
    empty = {"PSA_RESTORE": "1", "PSA_CHECKPOINT_FILES": str(tmp_path / "empty"), "PSA_CHECKPOINT_EVERY_S": "3600"}
    run = start(site, "nothing", **empty)
    assert run.finish() == 0, run.output
    assert run.output.count("there is nothing to restore") == 1, "only the process that creates the job looks at files"
    shutil.rmtree(tmp_path / "empty", ignore_errors=True)
    lose(redis, tmp_path / "redis")
    run = start(site, "nothing", **empty)
    assert run.finish() == 4 and str(tmp_path / "empty") in run.output, run.output
    # What cannot be read may be all that is left of a job that ZooKeeper has lost, too.
    damaged = tmp_path / "empty" / "unknown" / "one"
    damaged.mkdir(parents=True)
    (damaged / "psa.json").write_text("{")
    run = start(site, "unknown", **empty)
    assert run.finish() == 4 and "no whole checkpoint" in run.output, run.output
