"""Making one version of many shards durable: chunks and flips in one stream, and one old chunk freed for each new one.

Per shard the order is: write the new chunks, flip the head, free the chunks that the flip dropped. The flip checks
that its chunks are whole, so their replies are not waited for before it is sent.

Freed and written memory keep pace because Redis' allocator soon gives what is free back to the kernel, and fetching
it again page by page costs Redis more than receiving the data (with shards of 48 MiB: half of the speed). The flip
therefore only lets the dropped chunks expire, and each later SET is preceded by the removal of one of them, whose
memory it gets. A writer that dies in between leaves keys that expire.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

from xxhash import xxh3_128_hexdigest

from psa_store.errors import DependencyUnfit, DependencyUnreachable, Fenced, Rewound
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import text
from psa_store.storage.head import (
    Head,
    Manifest,
    Section,
    chunk_sizes,
    identity,
    split_chunks,
    term_text,
    version_field,
)
from psa_store.storage.library import FunctionCall
from psa_store.storage.stream import Command, Stream
from psa_store.testing.failpoints import failpoint

CHUNK_EXPIRY_S = 300
"""Chunks live this long until a commit makes them permanent: a writer that dies leaves nothing behind.

Much longer than a shard takes to be written, else its flip finds chunks missing and they are written again. Not longer,
because what a writer leaves may be as large as its shards: where they die all the time, this is how many pile up.
"""
TRIES_MAX = 5
"""Looks at a head before a change is given up: each fails only if the head changed between look and change."""


@dataclass(frozen=True, slots=True)
class ShardState:
    """What one shard is to be in the new version."""

    shard: int
    arrays: Mapping[str, tuple[str, memoryview]]
    """Section name -> (dtype, bytes). The memory must not change until the commit is over."""
    scalars: Mapping[str, float | int]
    expect: int | None
    """The version that the caller committed last, None if it knows of none."""
    extra: bool = False
    """Whether other shards may not commit this version."""


Outcomes: TypeAlias = Generator[tuple[int, Manifest | Fenced | Rewound], None, None]


class Commit:
    """Version ``version`` of some shards under ``term``. For one use.

    Args:
        heads: reads the heads of these shards.
        keep: how many versions a head keeps; older ones are dropped in the same flip.
        pause: see :meth:`RedisStore.commit_each`.
    """

    def __init__(
        self,
        caller: Caller,
        heads: Callable[[Iterable[int]], list[Head]],
        job: str,
        term: int,
        version: int,
        keep: int,
        pause: Callable[[float], None] | None = None,
    ) -> None:
        self._caller = caller
        self._heads = heads
        self._job = job
        self._term = term
        self._version = version
        self._keep = keep
        self._pause = pause
        self._in_doubt: dict[int, Manifest] = {}
        """Shards whose flip may be under way, or was answered with a head that has changed meanwhile."""
        self._unflipped: set[str] = set()
        """Chunks that were written and that no head is known to name."""
        self._dropped: deque[str] = deque()
        """Chunks that no head names any more."""

    def outcomes(self, states: Sequence[ShardState]) -> Outcomes:
        """Commit the shards one after the other; yields each with its manifest, or why it was refused."""
        left = {state.shard: state for state in states}
        heads = {head.shard: head for head in self._heads(left)}
        self._caller.prepare()
        broken: DependencyUnreachable | None = None
        with Stream(self._caller.pool, self._commands(states, heads)) as stream:
            try:
                while (answer := self._caller.with_functions(stream.next_answer)) is not None:
                    shard, reply = answer
                    outcome = self._judged(heads[shard], self._in_doubt[shard], reply)
                    if outcome is not None:
                        failpoint("commit.after_flip")
                        del self._in_doubt[shard], left[shard]
                        yield shard, outcome
            except DependencyUnfit:
                self._clean_up()  # what it lacks may be memory
                raise
            except DependencyUnreachable as error:
                broken = error
        # Flips that were under way: done or not? The heads know, and if Redis is still away, looking raises.
        for shard, manifest in self._in_doubt.items():
            yield shard, self._settled(left.pop(shard), manifest)
        if broken is not None and left:
            raise broken
        failpoint("commit.before_sweep")
        self._clean_up()

    def _commands(self, states: Sequence[ShardState], heads: Mapping[int, Head]) -> Iterator[Command]:
        """The stream. Digests are taken just before the bytes are sent, while they are on their way to the cache."""
        written, since_s = 0, time.monotonic()
        for state in states:
            nonce = secrets.token_hex(4)
            sections = []
            for name, (dtype, data) in state.arrays.items():
                digests = []
                for index, part in enumerate(split_chunks(data)):
                    if self._pause is not None and written:
                        self._pause(time.monotonic() - since_s)
                        since_s = time.monotonic()
                    digests.append(xxh3_128_hexdigest(part))
                    if self._dropped:
                        yield Command(self._caller.words(_sweep(self._dropped.popleft())))
                    key = keys.chunk(self._job, state.shard, self._version, self._term, nonce, name, index)
                    self._unflipped.add(key)
                    yield _set(key, part)
                    written += 1
                    failpoint("commit.chunk", written)
                sections.append(Section(name, dtype, data.nbytes, tuple(digests)))
            manifest = Manifest(
                self._version, self._term, nonce, tuple(sections), dict(state.scalars), extra=state.extra
            )
            self._in_doubt[state.shard] = manifest
            failpoint("commit.before_flip")
            call = flip(self._job, heads[state.shard], manifest, self._keep, state.expect)
            yield Command(self._caller.words(call), awaited=state.shard)

    def _clean_up(self) -> None:
        """Remove what this commit wrote or dropped and no head names, rather now than when it expires."""
        with suppress(DependencyUnreachable):
            self._caller.functions([_sweep(key) for key in (*self._unflipped, *self._dropped)], durable=False)

    def _judged(self, head: Head, manifest: Manifest, reply: Sequence[Any]) -> Manifest | Fenced | Rewound | None:
        """What a flip that was decided on ``head`` has come to; None if that must be looked up."""
        where = f"job {self._job!r}, shard {head.shard}"
        match reply[0]:
            case b"ok":
                self._unflipped.difference_update(manifest.chunk_keys(self._job, head.shard))
                self._dropped += head.freed(self._job, _old(head, manifest, self._keep))
                return manifest
            case b"fenced":
                return Fenced(
                    f"{where}: commit of version {self._version} refused, term "
                    f"{int(reply[1], 16)} owns the shard and ours is {self._term}"
                )
            case b"rewound":
                return Rewound(f"{where}: Redis lost {text(reply[1])!r}, which we wrote")
        return None

    def _settled(self, state: ShardState, manifest: Manifest) -> Manifest | Fenced | Rewound:
        """After a flip that found another head, or not its chunks: look, and flip again, until it is done or refused.

        Raises:
            DependencyUnreachable: the head, or the chunks, change every time.
        """
        for _ in range(TRIES_MAX):
            (head,) = self._heads([state.shard])
            stored = head.manifest(self._version)
            if stored is not None and stored.nonce == manifest.nonce:
                return manifest  # an earlier try did it, and only its answer was lost
            try:
                (reply,) = self._caller.functions([flip(self._job, head, manifest, self._keep, state.expect)])
            except DependencyUnfit:
                raise
            except DependencyUnreachable:
                continue  # done or not? The head knows, and if Redis is still away, looking raises
            outcome = self._judged(head, manifest, reply)
            if outcome is not None:
                return outcome
            if reply[0] == b"missing":
                write_chunks(self._caller, self._job, manifest, state)
        raise DependencyUnreachable(
            unsettled(self._caller, self._job, state.shard, f"version {self._version} could not be committed")
        )


def flip(job: str, head: Head, manifest: Manifest, keep: int, expect: int | None) -> FunctionCall:
    """The call that makes ``manifest`` one of the ``keep`` versions of ``head``, as long as that is still the head."""
    sizes = [size for section in manifest.sections for size in chunk_sizes(section.size_bytes)]
    chunks = list(zip(manifest.chunk_keys(job, head.shard), sizes, strict=True))
    expected = "" if expect is None else version_field(expect)
    return put(job, head, manifest.field, manifest, chunks, _old(head, manifest, keep), expected, manifest.term)


def put(
    job: str,
    head: Head,
    name: str,
    manifest: Manifest,
    chunks: Sequence[tuple[str, int]],
    gone: Collection[str | bytes],
    expect: str,
    term: int,
) -> FunctionCall:
    """The call that writes one field of ``head`` as it was read, and takes ``gone`` out of it.

    Args:
        chunks: those that must be there, with their sizes, and become permanent.
        gone: other fields, or ``name`` itself, which is replaced.
        expect: a field that must be there; empty for none.
    """
    return (
        "psa_commit",
        [keys.head(job, head.shard), *(key for key, _ in chunks), *head.freed(job, gone)],
        [
            term_text(term),
            name,
            manifest.to_json(),
            expect,
            len(chunks),
            *(size for _, size in chunks),
            *identity(head),
            *gone,
        ],
    )


def write_chunks(caller: Caller, job: str, manifest: Manifest, state: ShardState) -> None:
    """Write the chunks of a manifest that are not there."""
    parts = [part for _, data in state.arrays.values() for part in split_chunks(data)]
    chunks = zip(manifest.chunk_keys(job, state.shard), parts, strict=True)
    with Stream(caller.pool, (_set(key, part) for key, part in chunks)) as stream:
        caller.retrying(stream.next_answer)


def _old(head: Head, manifest: Manifest, keep: int) -> list[str | bytes]:
    """The fields of the versions that make room for ``manifest``, and of those that can not be read.

    Extra ones are counted apart: however many there are, what all shards commit stays common to them. They go when
    there are ``keep`` of those, all of them newer.
    """
    versions = {each.version: each.extra for each in (*head.manifests, manifest)}
    common = sorted(version for version, extra in versions.items() if not extra)[-keep:]
    oldest = common[0] if len(common) == keep else -1
    extras = sorted(version for version, extra in versions.items() if extra and version > oldest)
    kept = {*common, *extras[-keep:]}
    old = [each.field for each in head.manifests if each.version == manifest.version or each.version not in kept]
    return [*old, *head.damaged_versions]


def unsettled(caller: Caller, job: str, shard: int, what: str) -> str:
    return (
        f"Redis at {caller.where}: job {job!r}, shard {shard}: {what} in {TRIES_MAX} tries, because "
        "its head or its chunks changed every time. Try again, and see what else writes to the keys of this job."
    )


def _sweep(key: str) -> FunctionCall:
    return "psa_sweep", [key], []


def _set(key: str, part: memoryview) -> Command:
    """NX, because a SET whose connection broke may arrive after another try and the flip are done: it would give a
    committed chunk its expiry back, and the version would vanish minutes later."""
    return Command(("SET", key, part, "EX", CHUNK_EXPIRY_S, "NX"))
