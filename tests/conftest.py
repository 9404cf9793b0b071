"""Real servers for the tests: one private Redis and one private ZooKeeper for the session, a fresh job name each."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Generator, Iterator

import hypothesis
import pytest
import torch

from chaos.cluster.spawner import Spawner
from psa_store.launch import PrivateRedis, PrivateZooKeeper
from tests.forked import HASH_SEED
from tests.harness import LIVE, WITH_STACKS, Site


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also what is marked long: more of what others test in short")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        left_out = pytest.mark.skip(reason="long: ./deploy/test --long plays it")
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(left_out)


def pytest_configure() -> None:
    """Make the tests, and what they start, independent of the environment.

    A shell that runs pytest in the background has Ctrl-C ignored; a checkout may hold a psa.toml; and how long a
    hypothesis example takes depends on how busy the machine is.
    """
    hypothesis.settings.register_profile("psa", deadline=None)
    hypothesis.settings.load_profile("psa")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["PSA_CONFIG"] = ""
    # A second thread waits for the first by spinning, on a processor that others of the suite want.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Let no collection of garbage look again at what was imported: some of the product's code collects by itself."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("site")
    redis, zookeeper = PrivateRedis(folder / "redis"), PrivateZooKeeper(folder / "zookeeper")
    try:
        redis.start(120)
        zookeeper.start(120)
        with Spawner({**Site(redis.url, zookeeper.hosts, folder).env, **WITH_STACKS, **HASH_SEED}) as spawner:
            yield Site(redis.url, zookeeper.hosts, folder, spawner)
    finally:
        redis.stop()
        zookeeper.stop()


_FAILED = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    item.stash[_FAILED] = report.failed
    return report


@pytest.fixture(autouse=True)
def nothing_is_left_running(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test left running says what it was doing: perhaps the fault is there."""
    yield
    for run in list(LIVE):
        if request.node.stash.get(_FAILED, False):
            print(run.last_words())
        run.kill()
