"""A job that rounds on the way: the carrier and the deaths do not show in its bits, the rounding does."""

from __future__ import annotations

import os
import signal

import pytest

from tests.harness import Run, Site

STEPS = 60
OPTIONS: dict[str, object] = {"workers": 2, "servers": 2, "ranks": 2, "commit_every": 10}


def start(site: Site, job: str, carrier: str = "auto", **options: object) -> Run:
    return site.run(job, "--steps", str(STEPS), env={"PSA_CARRIER": carrier}, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def rounded(site: Site) -> str:
    run = start(site, "rounded", compress="bf16:both")
    assert run.finish() == 0, run.output
    return site.digest("rounded", STEPS)


def test_it_is_another_job_than_the_exact_one(site: Site, rounded: str) -> None:
    run = start(site, "exact")
    assert run.finish() == 0, run.output
    assert site.digest("exact", STEPS) != rounded
    again = start(site, "rounded", compress="none")
    assert again.finish() == 2
    assert "compression='bf16:both', this process has compression='none'" in again.output


def test_the_carrier_does_not_show(site: Site, rounded: str) -> None:
    run = start(site, "rounded-tcp", "tcp", compress="bf16:both")
    assert run.finish() == 0, run.output
    assert site.digest("rounded-tcp", STEPS) == rounded


@pytest.mark.parametrize(
    ("carrier", "role"),
    [
        ("auto", "workers"),
        ("tcp", "servers"),
        pytest.param("auto", "servers", marks=pytest.mark.long),
        pytest.param("tcp", "workers", marks=pytest.mark.long),
    ],
)
def test_deaths_do_not_show(site: Site, rounded: str, carrier: str, role: str) -> None:
    job = f"rounded-{carrier}-{role}"
    run = start(site, job, carrier, compress="bf16:both")
    run.wait_for_step(15)
    os.kill(site.pids(job, role)[0], signal.SIGKILL)
    run.wait_for_line(lambda line: "restarting" in line)
    assert run.finish() == 0, run.output
    assert site.digest(job, STEPS) == rounded
