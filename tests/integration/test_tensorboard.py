"""`psa run --tensorboard`: what stands in Redis about the job becomes event files, whichever process wrote it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import redis
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from psa_store.job.document import to_text
from psa_store.observe import Event, EventKind, JobHistory
from psa_store.observe.curve import Point
from psa_store.observe.tensorboard import BoardWriter
from psa_store.storage import keys
from tests.harness import Site

FAR = 10**6
"""Versions that the jobs here do not reach: their own controller may add points of its own."""


@pytest.fixture
def raw(site: Site) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(site.redis) as client:
        yield client


def add_point(raw: redis.Redis, job: str, version: int, loss: float) -> None:
    point = Point(time.time() + FAR + version, version, loss=loss)
    raw.xadd(keys.curve(job), {"json": to_text(point)})


def losses(folder: Path) -> list[tuple[int, float]]:
    found = EventAccumulator(str(folder))
    found.Reload()
    names = found.Tags()["scalars"]
    return [(each.step, each.value) for each in found.Scalars("loss") if each.step >= FAR] if "loss" in names else []


def test_a_run_and_the_one_that_resumes_it_write_one_curve(site: Site, raw: redis.Redis, tmp_path: Path) -> None:
    job = "board"
    for number, steps in enumerate((10, 20)):
        run = site.run(job, "--steps", str(steps), "--total", "20", workers=1, tensorboard=tmp_path)
        run.wait_for_step(steps // 2)
        add_point(raw, job, FAR + number, 1.0 - number / 2)
        assert run.finish() == 0, run.output
    assert losses(tmp_path / job) == [(FAR, 1.0), (FAR + 1, 0.5)]


def test_what_was_told_last_is_written_when_the_run_ends(site: Site, raw: redis.Redis, tmp_path: Path) -> None:
    with (
        closing(BoardWriter("last", tmp_path, site.redis, 5.0)),
        closing(JobHistory("last", site.redis, timeout_s=5.0)) as history,
    ):
        add_point(raw, "last", FAR, 0.5)
        history.add(Event(time.time(), EventKind.RECOVERED, "-", version=7))
    found = EventAccumulator(str(tmp_path / "last"))
    found.Reload()
    assert losses(tmp_path / "last") == [(FAR, 0.5)]
    assert [(each.step, each.value) for each in found.Scalars("recoveries")] == [(7, 1.0)]


def test_a_folder_that_cannot_be_used_ends_the_run_with_one_line(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = site.run("nowhere", "--steps", "20", workers=1, tensorboard=tmp_path / "file")
    assert run.finish() == 2
    assert f"psa: {tmp_path / 'file' / 'nowhere'} cannot be used for TensorBoard" in run.output
    assert "Traceback" not in run.output
