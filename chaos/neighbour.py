"""What another program may write over a job: the texts, and clients of ZooKeeper and Redis that write them.

Faults `neighbour-*` and `tests/kill/test_neighbours.py` use it. A walk goes over the znodes and keys that it finds, so
what a job keeps in future is overwritten as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import redis
from kazoo.client import KazooClient
from kazoo.exceptions import NoNodeError
from kazoo.security import make_digest_acl

from psa_store.coordination import as_access
from psa_store.errors import PsaError
from psa_store.job.layout import layout_from_json
from psa_store.storage import RedisStore

LARGE_BYTES = 900_000
OF_ANY_TEXT = ("no text", "a brace", "nothing", "another type", "a huge number", "large", "deep")
OF_DOCUMENTS = ("newer", "older", "other types", "huge numbers")
WRITTEN_AGAIN = ("plan", "term", "config", "run")
"""Znodes that come back when they are deleted; others go with what they were for."""


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


def in_form(form: str, text: bytes) -> bytes:
    """What stands there then; a brace, where a text has no such form."""
    return dict(forms(text)).get(form, b"{")


def plain_client(where: str) -> KazooClient:
    """A client of Kazoo's for an address as PSA_ZOOKEEPER has it; not started."""
    access = as_access(where)
    digest = make_digest_acl(access.user, access.password, all=True)
    return KazooClient(
        access.hosts,
        timeout=4.0,
        auth_data=[("digest", f"{access.user}:{access.password}")],
        default_acl=[digest],
    )


class ZooKeeperNeighbour:
    """Writes whatever it likes over the znodes of a job."""

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
        """None if there is no such znode."""
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


class RedisNeighbour:
    """Writes whatever it likes over the keys of a job. ``store``: to see that they are whole again."""

    FORMS = ("another kind", "gone", "impossible term", *OF_ANY_TEXT, *OF_DOCUMENTS)

    def __init__(self, client: redis.Redis, store: RedisStore, job: str) -> None:
        self._client: Any = client  # its answers are typed for text and bytes alike
        self._store = store
        self._job = job
        documents = store.documents(job)
        self._documents = documents.config(), documents.layout()
        self._shards = range(len(layout_from_json(self._documents[1] or "").shards))
        self.overwritten = 0

    def write_over(self, form: str, *, values: bool) -> None:
        """Write over all keys that are there, but for values of older versions.

        If no value of any version is left where a term begins, the job is lost.

        Args:
            values: also those of the newest version of shard 0.
        """
        (head,) = self._store.heads(self._job, [0])
        newest = [key.encode() for key in head.manifests[-1].chunk_keys(self._job, 0)] if values else []
        for key in [*self._keys(), *newest]:
            if form != "impossible term":
                self._write_over(key, form)
            elif key.endswith(b":head"):
                self._client.hset(key, "term", "f" * 16)

    def stored(self) -> dict[bytes, bytes]:
        """What the keys hold now, but for values, as Redis writes it down."""
        return {key: dump for key in self._keys() if (dump := self._client.dump(key)) is not None}

    def restore(self, earlier: Mapping[bytes, bytes]) -> None:
        """Write that in place of what stands there."""
        for key, dump in earlier.items():
            self._client.restore(key, 0, dump, replace=True)
            self.overwritten += 1

    def _keys(self) -> list[bytes]:
        """The documents of the job, and the heads of its shards."""
        documents = f"psa:{{{self._job}}}".encode()
        found = self._client.scan_iter(f"psa:{{{self._job}[:}}]*")
        return [key for key in found if key.startswith(documents) or key.endswith(b":head")]

    def _write_over(self, key: bytes, form: str) -> None:
        self.overwritten += 1
        kind = self._client.type(key)
        if form == "gone":
            self._client.delete(key)
        elif form == "another kind":
            self._client.delete(key)
            self._client.set(key, "x") if kind == b"hash" else self._client.sadd(key, "x")
        elif kind == b"string":
            self._client.set(key, in_form(form, self._client.get(key) or b""))
        elif kind == b"stream":
            self._client.xadd(key, {"json": in_form(form, b"{}"), "more": "x"})
        elif kind == b"hash":
            fields = {name: in_form(form, text) for name, text in self._client.hgetall(key).items()}
            self._client.hset(key, mapping={**fields, b"\xff": b"{"})

    def problem(self) -> str:
        """What a server that starts would not find as it was; empty if all is whole."""
        documents = self._store.documents(self._job)
        try:
            if (documents.config(), documents.layout()) != self._documents:
                return "the documents stay as they are"
            self._store.data_record(self._job).read()
            for head in self._store.heads(self._job, self._shards):
                if not head.manifests or not head.term or head.damaged.keys() - {b"\xff"}:
                    return f"{head} stays as it is"
        except PsaError as error:
            return str(error)
        return ""
