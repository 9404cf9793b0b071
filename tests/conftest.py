"""Real servers for the tests: one private Redis and one private ZooKeeper for the session, a fresh job name each."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import hypothesis
import pytest

from psa_store.launch import PrivateRedis, PrivateZooKeeper
from tests.harness import LIVE, Site


def pytest_configure() -> None:
    """What surrounds us is not to be seen, by us nor by what tests start.

    A shell that runs us in the background has Ctrl-C ignored; a checkout may hold the psa.toml of whoever works there;
    and how long an example takes says how busy the machine is.
    """
    hypothesis.settings.register_profile("psa", deadline=None)
    hypothesis.settings.load_profile("psa")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PSA_CONFIG"] = ""


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    redis, zookeeper = PrivateRedis(folder / "redis"), PrivateZooKeeper(folder / "zookeeper")
    try:
        redis.start(10)
        zookeeper.start(30)
        yield Site(redis.url, zookeeper.hosts, folder)
    finally:
        redis.stop()
        zookeeper.stop()


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    yield
    for run in list(LIVE):
        run.kill()
