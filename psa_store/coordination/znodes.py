"""The requests that one call makes to ZooKeeper: typed, and each bounded by the deadline of the call.

What an attempt expects to happen (a node is absent, exists, has another version) is a return value. What leaves the
outcome open (connection lost, session expired, time is up) is raised as Kazoo's exception, for ``session.py``, which
makes the call's next attempt or ends it. Only this package may use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from kazoo.exceptions import BadVersionError, ConnectionLoss, NodeExistsError, NoNodeError, NotEmptyError

from psa_store.coordination.client import Client
from psa_store.errors import UsageError

TEXT_BYTES_MAX = 900_000
"""ZooKeeper drops the connection at 1 MiB, headers included, instead of refusing."""

ANY_VERSION = -1


@dataclass(frozen=True, slots=True)
class Znode:
    """A node as it was read or written. ``owner``: the session that an ephemeral node belongs to, else 0."""

    path: str
    text: str
    version: int
    owner: int
    modified_s: float = 0.0
    """When its text was written, by ZooKeeper's clock, in seconds since 1970; only where it was read."""


class Znodes:
    """``repeated``: an earlier attempt of the same call was cut off, so it may have been carried out already."""

    def __init__(
        self,
        client: Client,
        *,
        session_id: Callable[[], int],
        left_s: Callable[[], float],
        on_watch: Callable[[object], None],
        repeated: bool,
    ) -> None:
        self._client = client
        self._session_id = session_id
        self._left_s = left_s
        self._on_watch = on_watch
        self.repeated = repeated

    @property
    def session_id(self) -> int:
        """Id of our present session."""
        return self._session_id()

    def get(self, path: str, *, watch: bool = False) -> Znode | None:
        """Read a node; None if it is absent, and then a watch waits for its creation."""
        while True:
            found = self.get_all([path], watch=watch)[0]
            if found is not None or not watch or self._is_absent(path):
                return found

    def get_all(self, paths: Sequence[str], *, watch: bool = False) -> list[Znode | None]:
        """Read several nodes in one round trip; None for those that are absent, without a watch."""
        asked = [self._client.get_async(path, watch=self._watcher(watch)) for path in paths]
        return [self._znode(path, answer) for path, answer in zip(paths, asked, strict=True)]

    def children(self, path: str, *, watch: bool = False) -> list[str]:
        """Names of the children, sorted; none if the node is absent, and then a watch waits for its creation."""
        while True:
            try:
                names: list[str] = self._answer(self._client.get_children_async(path, watch=self._watcher(watch)))
                return sorted(names)
            except NoNodeError:
                if not watch or self._is_absent(path):
                    return []

    def create(
        self, path: str, text: str, *, ephemeral: bool = False, sequence: bool = False, parents: bool = True
    ) -> Znode | None:
        """Create a node; None if it exists. Missing parents are created too, or without ``parents`` it is None."""
        asked = self._client.create_async(
            path,
            _encode(path, text),
            ephemeral=ephemeral,
            sequence=sequence,
            makepath=parents,
            include_data=True,
        )
        try:
            created, stat = self._answer(asked)
        except NodeExistsError:
            return None
        except NoNodeError:
            if parents:
                raise
            return None
        return Znode(created, text, stat.version, stat.ephemeralOwner)

    def set(self, path: str, text: str, version: int = ANY_VERSION) -> Znode | None:
        """Replace the text; None if the node is absent or has another version."""
        try:
            stat = self._answer(self._client.set_async(path, _encode(path, text), version))
        except (NoNodeError, BadVersionError):
            return None
        return Znode(path, text, stat.version, stat.ephemeralOwner)

    def set_while(self, path: str, text: str, version: int, unchanged: Znode) -> Znode | None:
        """Replace the text if another node is still as it was read, in one transaction; None if either is not."""
        transaction = self._client.transaction()
        transaction.check(unchanged.path, unchanged.version)
        transaction.set_data(path, _encode(path, text), version)
        checked, stat = self._answer(transaction.commit_async())
        if isinstance(checked, Exception) or isinstance(stat, Exception):
            return None
        return Znode(path, text, stat.version, stat.ephemeralOwner)

    def delete(self, *paths: str) -> None:
        """Delete nodes that may be absent; those with children stay."""
        asked = [self._client.delete_async(path) for path in paths]
        for answer in asked:
            try:
                self._answer(answer)
            except (NoNodeError, NotEmptyError):
                continue

    def is_ours(self, path: str) -> bool:
        """Whether a node is open to our user, and to no other."""
        acls, _ = self._answer(self._client.get_acls_async(path))
        return bool(acls == self._client.default_acl)

    def own(self, path: str) -> None:
        """Let our user do everything with a node, and others nothing; it may be absent."""
        with suppress(NoNodeError):
            self._answer(self._client.set_acls_async(path, self._client.default_acl))

    def sync(self) -> None:
        """Ask the *leader*: answered only while our server follows it and it knows our session."""
        self._answer(self._client.sync_async("/"))

    def _watcher(self, watch: bool) -> Callable[[object], None] | None:
        return self._on_watch if watch else None

    def _is_absent(self, path: str) -> bool:
        """Leave a watch for the creation of a node; False if it was created meanwhile."""
        return self._answer(self._client.exists_async(path, watch=self._on_watch)) is None

    def _znode(self, path: str, asked: Any) -> Znode | None:
        try:
            data, stat = self._answer(asked)
        except NoNodeError:
            return None
        return Znode(path, (data or b"").decode(errors="replace"), stat.version, stat.ephemeralOwner, stat.mtime / 1e3)

    def _answer(self, asked: Any) -> Any:
        try:
            return asked.get(timeout=max(0.0, self._left_s()))
        except RuntimeError as error:  # Kazoo lost count of the answers, and its connection ends with that
            raise ConnectionLoss(str(error)) from error


def _encode(path: str, text: str) -> bytes:
    data = text.encode()
    if len(data) > TEXT_BYTES_MAX:
        raise UsageError(
            f"{path}: {len(data)} bytes are more than the {TEXT_BYTES_MAX} that a znode may hold; use fewer shards"
        )
    return data
