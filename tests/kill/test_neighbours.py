"""What a neighbour writes ends no run and changes no bit: everything that a job keeps is overwritten while it trains.

The walk goes over the znodes and keys that it finds, so what a job keeps in future is overwritten as well.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import redis
from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError

from psa_store.errors import PsaError
from psa_store.job.layout import layout_from_json
from psa_store.storage import RedisStore, keys
from tests.harness import PATIENCE_S, Run, Site, plain_client

STEPS = 200
LARGE_BYTES = 900_000


def forms(text: bytes) -> Iterator[tuple[str, bytes]]:
    """What may stand where this document stood: none, another release's, and one that says what can not be."""
    yield "no text", b"\x00\xff\x1b[2J"
    yield "a brace", b"{"
    yield "nothing", b""
    yield "another type", b"[1, 2]"
    yield "a huge number", b"9" * 40
    yield "large", b"x" * LARGE_BYTES
    yield "deep", b"[" * 50_000
    try:
        fields = json.loads(text)
    except ValueError:
        return
    if isinstance(fields, dict):
        rest = {name: value for name, value in fields.items() if name != "format"}
        yield "newer", json.dumps({"format": 99, **rest, "added": 1}).encode()
        yield "older", json.dumps(rest).encode()
        yield "other types", json.dumps(fields | {name: [value] for name, value in rest.items()}).encode()
        huge = {name: 10**30 for name, value in rest.items() if type(value) is int}
        if huge:
            yield "huge numbers", json.dumps(fields | huge).encode()


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


class Neighbour:
    """A process that reaches ZooKeeper, and writes whatever it likes."""

    def __init__(self, zookeeper: KazooClient, job: str) -> None:
        self._zookeeper = zookeeper
        self.root = f"/psa/{job}"

    def znodes(self) -> list[str]:
        """All of the job that hold a text."""
        return [path for path in self._below(self.root) if self.text(path)]

    def _below(self, path: str) -> Iterator[str]:
        yield path
        try:
            for name in self._zookeeper.get_children(path):
                yield from self._below(f"{path}/{name}")
        except NoNodeError:
            return

    def text(self, path: str) -> bytes | None:
        try:
            return bytes(self._zookeeper.get(path)[0])
        except NoNodeError:
            return None

    def write(self, path: str, text: bytes) -> bool:
        """False if it is gone."""
        try:
            self._zookeeper.set(path, text)
        except NoNodeError:
            return False
        return True

    def create(self, path: str, text: bytes) -> None:
        self._zookeeper.create(path, text, makepath=True)

    def delete(self, path: str) -> None:
        self._zookeeper.delete(path, recursive=True)

    def await_change(self, run: Run, path: str, text: bytes | None) -> None:
        """Wait until something else than this stands there."""
        deadline_s = time.monotonic() + PATIENCE_S
        while self.text(path) == text:
            assert run.process.poll() is None and time.monotonic() < deadline_s, f"{path} stays as it is"
            time.sleep(0.01)  # a watch would be one of many; what is awaited comes within milliseconds


@pytest.fixture
def neighbour(site: Site, request: pytest.FixtureRequest) -> Iterator[Neighbour]:
    client = plain_client(site.zookeeper)
    client.start()
    with closing(client):
        yield Neighbour(client, request.param)
        client.stop()


class Rival:
    """A process that reaches Redis, and writes whatever it likes over the keys of a job."""

    def __init__(self, client: redis.Redis, job: str) -> None:
        self._client = client
        self._job = job
        texts = self._client.mget(keys.config(job), keys.layout(job))
        self._config, self._layout = (bytes(text) for text in texts)
        self.overwritten = 0

    def rounds(self, store: RedisStore) -> Iterator[str]:
        """Each writes over all keys that are there then, but for values of older versions; yields in which form.

        If no value of any version is left where a term begins, the job is lost.
        """
        for form in ("another kind", "gone", "impossible term", *(name for name, _ in forms(self._config))):
            (head,) = store.heads(self._job, [0])
            newest = head.manifests[-1].chunk_keys(self._job, 0)
            for key in self._client.scan_iter(f"psa:{{{self._job}[:}}]*"):
                if form == "impossible term":
                    if key.endswith(b":head"):
                        self._client.hset(key, "term", "f" * 16)
                elif (
                    key.startswith(f"psa:{{{self._job}}}".encode()) or key.endswith(b":head") or key.decode() in newest
                ):
                    self._write_over(key, form)
            yield form

    def _write_over(self, key: bytes, form: str) -> None:
        self.overwritten += 1
        kind = self._client.type(key)
        if form == "gone":
            self._client.delete(key)
        elif form == "another kind":
            self._client.delete(key)
            self._client.set(key, "x") if kind == b"hash" else self._client.sadd(key, "x")
        elif kind == b"string":
            self._client.set(key, _in_form(form, self._client.get(key) or b""))
        elif kind == b"stream":
            self._client.xadd(key, {"json": _in_form(form, b"{}"), "more": "x"})
        elif kind == b"hash":
            fields = {name: _in_form(form, text) for name, text in self._client.hgetall(key).items()}
            self._client.hset(key, mapping={**fields, b"\xff": b"{"})

    def await_whole(self, run: Run, store: RedisStore, shards: int) -> None:
        """Wait until what a server that starts needs can be read again."""
        deadline_s = time.monotonic() + PATIENCE_S
        while problem := self._problem(store, shards):
            if run.process.poll() is not None:
                pytest.fail(f"{problem}; the run ended with {run.finish()}:\n{run.output}")
            assert time.monotonic() < deadline_s, problem
            time.sleep(0.05)  # nothing tells; servers look every two seconds

    def _problem(self, store: RedisStore, shards: int) -> str:
        documents = store.documents(self._job)
        try:
            if (documents.config(), documents.layout()) != (self._config.decode(), self._layout.decode()):
                return "the documents stay as they are"
            store.data_record(self._job).read()
            for head in store.heads(self._job, range(shards)):
                if not head.manifests or not head.term or head.damaged.keys() - {b"\xff"}:
                    return f"{head} stays as it is"
        except PsaError as error:
            return str(error)
        return ""


def _in_form(form: str, text: bytes) -> bytes:
    return dict(forms(text)).get(form, b"{}")


@pytest.mark.parametrize("neighbour", ["znodes"], indirect=True)
def test_every_znode_overwritten_or_deleted_is_written_again_and_no_bit_changes(
    site: Site, undisturbed: str, neighbour: Neighbour
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
                neighbour.await_change(run, path, text)
                overwritten += 1
        if neighbour.text(path) is not None and "/checkpoints/" not in path:
            neighbour.delete(path)
            if path.rpartition("/")[2] in ("plan", "term", "config", "run"):
                neighbour.await_change(run, path, None)
    assert overwritten > 50
    assert run.finish() == 0, run.output
    assert site.digest("znodes", STEPS) == undisturbed


def test_every_key_overwritten_or_deleted_is_written_again_and_no_bit_changes(site: Site, undisturbed: str) -> None:
    run = start(site, "keys", "--pace-s", "0.1", held=True)
    with closing(site.store()) as store, redis.Redis.from_url(site.redis) as client:
        store.check()
        shards = len(layout_from_json(store.documents("keys").layout() or "").shards)
        rival = Rival(client, "keys")
        for form in rival.rounds(store):
            print(f"Redis: {form}")
            rival.await_whole(run, store, shards)
        assert rival.overwritten > 100
        shown = site.describe("keys")
        assert any("xff" in each.where or "\ufffd" in each.where for each in shown.set_aside), shown
        assert shown.set_aside_count > 50, shown
    assert run.finish() == 0, run.output
    assert site.digest("keys", STEPS) == undisturbed
