"""What a neighbour writes ends no run and changes no bit: all that a job keeps is overwritten while it trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis

from chaos.neighbour import WRITTEN_AGAIN, RedisNeighbour, ZooKeeperNeighbour, forms, plain_client
from tests.harness import PATIENCE_S, Run, Site

STEPS = 200


def start(site: Site, job: str, *script: str, held: bool = False) -> Run:
    """Two workers and two servers, and a step ahead."""
    run = site.run(
        job, "--steps", str(STEPS), *script, held=held, workers=2, servers=2, ranks=2, commit_every=10, max_restarts=0
    )
    run.wait_for_step(1)
    return run


@pytest.fixture(scope="module")
def undisturbed(site: Site) -> str:
    run = start(site, "no-neighbour", "--pace-s", "0")
    assert run.finish() == 0, run.output
    return site.digest("no-neighbour", STEPS)


def await_change(neighbour: ZooKeeperNeighbour, run: Run, path: str, text: bytes | None) -> None:
    """Wait until something else than this stands there."""
    deadline_s = time.monotonic() + PATIENCE_S
    while neighbour.text(path) == text:
        assert run.process.poll() is None and time.monotonic() < deadline_s, f"{path} stays as it is"
        time.sleep(0.01)  # a watch would be one of many; what is awaited comes within milliseconds


def await_whole(neighbour: RedisNeighbour, run: Run) -> None:
    """Wait until what a server that starts needs can be read again."""
    deadline_s = time.monotonic() + PATIENCE_S
    while problem := neighbour.problem():
        if run.process.poll() is not None:
            pytest.fail(f"{problem}; the run ended with {run.finish()}:\n{run.output}")
        assert time.monotonic() < deadline_s, problem
        time.sleep(0.05)  # nothing tells; servers look every two seconds


@pytest.fixture
def neighbour(site: Site, request: pytest.FixtureRequest) -> Iterator[ZooKeeperNeighbour]:
    client = plain_client(site.zookeeper)
    client.start()
    with closing(client):
        yield ZooKeeperNeighbour(client, request.param)
        client.stop()


@pytest.mark.parametrize("neighbour", ["znodes"], indirect=True)
def test_every_znode_overwritten_or_deleted_is_written_again_and_no_bit_changes(
    site: Site, undisturbed: str, neighbour: ZooKeeperNeighbour
) -> None:
    run = start(site, "znodes", "--pace-s", "0.05", held=True)
    for name in ("workers/w", "servers/s", "election/rubbish", "barriers/x", "checkpoints/a b", "rubbish"):
        neighbour.create(f"{neighbour.root}/{name}", b"{")
    site_view = site.describe("znodes")
    shown = {each.where.removeprefix(neighbour.root) for each in site_view.set_aside}
    assert {"/workers/w", "/servers/s"} <= shown and any("set aside" in each.what for each in site_view.findings)
    foreign = {f"{neighbour.root}/{name}" for name in ("workers/w", "servers/s", "election/rubbish", "barriers/x")}
    overwritten = 0
    for path in set(neighbour.znodes()) - foreign - {f"{neighbour.root}/rubbish"}:
        before = neighbour.text(path)
        for what, text in forms(before or b""):
            if neighbour.write(path, text):
                print(f"{path}: {what}")
                await_change(neighbour, run, path, text)
                overwritten += 1
        if neighbour.text(path) is not None and "/checkpoints/" not in path:
            neighbour.delete(path)
            if path.rpartition("/")[2] in WRITTEN_AGAIN:
                await_change(neighbour, run, path, None)
    assert overwritten > 50
    assert run.finish() == 0, run.output
    assert site.digest("znodes", STEPS) == undisturbed


def test_every_key_overwritten_or_deleted_is_written_again_and_no_bit_changes(site: Site, undisturbed: str) -> None:
    run = start(site, "keys", "--pace-s", "0.1", held=True)
    with closing(site.store()) as store, redis.Redis.from_url(site.redis) as client:
        store.check()
        neighbour = RedisNeighbour(client, store, "keys")
        for form in RedisNeighbour.FORMS:
            print(f"Redis: {form}")
            neighbour.write_over(form, values=True)
            await_whole(neighbour, run)
        assert neighbour.overwritten > 100
        shown = site.describe("keys")
        assert any("xff" in each.where or "\ufffd" in each.where for each in shown.set_aside), shown
        assert shown.set_aside_count > 50, shown
    assert run.finish() == 0, run.output
    assert site.digest("keys", STEPS) == undisturbed
