"""Reads heads of shards, as they are; or, for a reader that only ever wants to go on, never as they were before."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from psa_store.job.document import Damaged
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.connection import OlderHead
from psa_store.storage.head import TERMS_AHEAD_MAX, Head, head_from_fields

_PIPELINE_SHARDS = 256


class HeadReader:
    """Thread-safe.

    Args:
        refuse_older: raise if the term of a head is lower than one that was read of it before. Then a Redis that went
            back in time answers, such as a master that was cut off, or a replica that was behind and is promoted;
            servers of the job bring it up to date within about a second.
    """

    def __init__(self, caller: Caller, set_aside: Callable[[Damaged], None], *, refuse_older: bool) -> None:
        self._caller = caller
        self._set_aside = set_aside
        self._terms: dict[str, int] | None = {} if refuse_older else None
        """The highest of each head that was read."""

    def read(self, job: str, shards: Iterable[int]) -> list[Head]:
        """What is committed; raises DependencyUnfit if it is older than what was read before."""
        listed = list(shards)
        found: list[Head] = []
        for start in range(0, len(listed), _PIPELINE_SHARDS):
            some = listed[start : start + _PIPELINE_SHARDS]
            found += self._caller.retrying(partial(self._read, job, some))
        return found

    def head(self, job: str, shard: int, fields: Mapping[bytes, bytes]) -> Head:
        """A head of these fields; what of it can not be read is set aside."""
        head = head_from_fields(job, shard, fields)
        for each in head.damage(job):
            self._set_aside(each)
        return head

    def _read(self, job: str, shards: Sequence[int]) -> list[Head]:
        replies = self._caller.pipelined([("HGETALL", keys.head(job, shard)) for shard in shards])
        heads = [self.head(job, shard, reply) for shard, reply in zip(shards, replies, strict=True)]
        if self._terms is not None:
            for head in heads:
                self._remember(self._terms, keys.head(job, head.shard), head)
        return heads

    def _remember(self, terms: dict[str, int], key: str, head: Head) -> None:
        seen = terms.get(key, 0)
        if b"term" in head.damaged or head.term >= seen + TERMS_AHEAD_MAX:
            return  # another program wrote it: that is no term
        if head.term < seen:
            self._caller.leave()
            raise OlderHead(f"{key} is of term {head.term}, and {seen} was seen")
        terms[key] = head.term
