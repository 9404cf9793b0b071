"""Changes of heads that move no tensor: a version gets a second name, or loses one.

A checkpoint is a second name (a *pin*) for one version of every shard: a copy of its manifest in the same head. Chunks
live as long as any field of their head names them, so nothing is copied and nothing is counted. Every change is made on
the head as it was read and refused if that has changed; then it is read again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from psa_store.errors import DependencyUnreachable, Fenced, Rewound
from psa_store.storage import keys
from psa_store.storage.caller import Caller
from psa_store.storage.commit import TRIES_MAX, put, unsettled
from psa_store.storage.head import Head, Manifest, identity, term_text
from psa_store.storage.library import FunctionCall


@dataclass(frozen=True, slots=True)
class Pins:
    """Changes the heads of one job."""

    caller: Caller
    heads: Callable[[Iterable[int]], list[Head]]
    """Reads heads of these shards."""
    job: str

    def copy(self, shards: Iterable[int], fields: Callable[[Head], tuple[str, str]], term: int | None) -> None:
        """Give what one field of each head names to a second one, whatever that named before.

        It is no extra version any more: a checkpoint, and where a job goes back to, is what all shards have.

        Raises:
            Fenced: ``term`` does not own a shard.
            Rewound: Redis does not know ``term``, or the first field is not there.
        """

        def change(head: Head) -> FunctionCall | None:
            source, target = fields(head)
            entries = head.entries()
            if source not in entries:
                raise Rewound(f"job {self.job!r}, shard {head.shard}: {source!r} is not stored any more")
            wanted = replace(entries[source], extra=False)
            if entries.get(target) == wanted:
                return None
            gone = [target] if target in entries else []
            return put(self.job, head, target, wanted, [], gone, source, head.term if term is None else term)

        self._change(shards, change, term)

    def drop(
        self, shards: Iterable[int], unwanted: Callable[[Head], Sequence[str | bytes]], term: int | None = None
    ) -> None:
        """Take fields out of heads; raises Fenced or Rewound if ``term`` (None: any) does not own a shard."""

        def change(head: Head) -> FunctionCall | None:
            gone = unwanted(head)
            if not gone:
                return None
            its_keys = [keys.head(self.job, head.shard), *head.freed(self.job, gone)]
            return "psa_drop", its_keys, [term_text(head.term if term is None else term), *identity(head), *gone]

        self._change(shards, change, term)

    def write(self, shard: int, name: str, manifest: Manifest, term: int) -> None:
        """Let a field of a head name chunks that are stored already. Idempotent."""

        def change(head: Head) -> FunctionCall | None:
            there = head.entries().get(name)
            if there is not None and there.nonce == manifest.nonce:
                return None
            return put(self.job, head, name, manifest, [], [name] if there is not None else [], "", term)

        self._change([shard], change, term)

    def _change(self, shards: Iterable[int], change: Callable[[Head], FunctionCall | None], term: int | None) -> None:
        """Make a change of each head, all in one round trip; those that had changed meanwhile are looked at again.

        Without a ``term`` of one's own, that a new one owns the shard is such a change.
        """
        left = list(shards)
        for _ in range(TRIES_MAX):
            calls = {head.shard: call for head in self.heads(left) if (call := change(head)) is not None}
            if not calls:
                return
            replies = self.caller.functions(list(calls.values()))
            left = [shard for shard, reply in zip(calls, replies, strict=True) if not self._done(shard, reply, term)]
            if not left:
                return
        raise DependencyUnreachable(unsettled(self.caller, self.job, left[0], "its versions could not be changed"))

    def _done(self, shard: int, reply: Sequence[Any], term: int | None) -> bool:
        where = f"job {self.job!r}, shard {shard}"
        match reply[0]:
            case b"ok":
                return True
            case b"fenced" if term is not None:
                raise Fenced(f"{where}: term {int(reply[1], 16)} owns it")
            case b"rewound":
                raise Rewound(f"{where}: Redis lost what we wrote, or does not know our term")
        return False
