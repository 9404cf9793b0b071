"""Finding the private servers of PSA_HOME: `psa up` and `psa run` start them, and write down where they answer.

The process that runs them holds a lock on its pid file as long as it lives; the kernel drops the lock however it dies.

The home is closed to other users: what is written down holds the passwords of the servers.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from psa_store.config.key import make_key_file
from psa_store.config.own_files import private_home, refuse_foreign, write_private
from psa_store.config.settings import Settings
from psa_store.errors import DataIntegrity, UsageError
from psa_store.job.document import from_text, to_text

_POLL_S = 0.005
_GLANCE_S = 0.1
_MARKS = ("up.pid", "servers.json", "redis")
"""What a folder has that is a home already."""


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where the private servers answer: a document in their home folder."""

    FORMAT: ClassVar[int] = 1

    redis: str = field(repr=False)
    zookeeper: str = field(repr=False)


def running(home: Path) -> Addresses | None:
    """The addresses of the private servers, if they run and answer.

    Raises:
        UsageError: the home belongs to another user.
        DataIntegrity: another release runs them, and wrote the addresses in a format that this one does not know.
    """
    path = _addresses_path(home)
    if holder(home) is None or not path.exists():
        return None
    return from_text(Addresses, path.read_text(), f"{path}, of the private servers that run,")


def fill_addresses(settings: Settings) -> Settings:
    """Settings with both addresses: their own, else those of the private servers that run.

    Raises:
        UsageError: they name one or none, and no private servers run.
    """
    if settings.redis is not None and settings.zookeeper is not None:
        return with_private_key(settings) if _are_private(settings) else settings
    found = running(settings.home)
    if found is None:
        addresses = {"PSA_REDIS": settings.redis, "PSA_ZOOKEEPER": settings.zookeeper}
        unset = " and ".join(name for name, address in addresses.items() if address is None)
        raise UsageError(
            f"no private servers run in {settings.home}, and {unset} {'are' if ' ' in unset else 'is'} not set: "
            "`psa up` starts private servers, `psa run` starts them with the job; or set both to your own"
        )
    return with_private_key(with_addresses(settings, found))


def _are_private(settings: Settings) -> bool:
    """Whether both addresses are those of the private servers: a process may be told them instead of finding them."""
    with suppress(OSError, DataIntegrity, UsageError):  # they are no concern of a process that uses other servers
        found = running(settings.home)
        return found is not None and (settings.redis, settings.zookeeper) == (found.redis, found.zookeeper)
    return False


def with_private_key(settings: Settings) -> Settings:
    """The same settings, with the key of the private servers where they say none."""
    path = _key_path(settings.home)
    if settings.key is not None or settings.key_file is not None or not os.path.exists(path):
        return settings
    return settings.model_copy(update={"key_file": path})


def with_addresses(settings: Settings, found: Addresses) -> Settings:
    """The same settings, with these addresses where they say none."""
    update: dict[str, object] = {}
    if settings.redis is None:
        update["redis"] = found.redis
    if settings.zookeeper is None:  # what is said about another ZooKeeper is not for this one
        others = ("zookeeper_credentials", "zookeeper_ca", "zookeeper_cert", "zookeeper_key")
        update |= {"zookeeper": found.zookeeper, **dict.fromkeys(others)}
    return settings.model_copy(update=update)


def redis_of(settings: Settings) -> str | None:
    """The URL of Redis: that of the settings, else of the private one that runs; None if neither is known."""
    found = running(settings.home) if settings.redis is None else None
    return found.redis if found else settings.redis


def known_zookeeper(settings: Settings) -> str:
    """The addresses of ZooKeeper: those of the settings, else of the private one that runs.

    Raises:
        UsageError: neither is known.
    """
    found = running(settings.home) if settings.zookeeper is None else None
    addresses = found.zookeeper if found else settings.zookeeper
    if addresses is None:
        raise UsageError(
            "ZooKeeper is not known: set PSA_ZOOKEEPER to host:port,host:port, or start a private one with "
            f"`psa up` (none runs in {settings.home})"
        )
    return addresses


def make_home(home: Path) -> None:
    """Make the folder; raises UsageError if it is another user's, or open to others."""
    private_home(home, _MARKS)


def hold_home(home: Path) -> Callable[[], None] | None:
    """Become the one process that runs private servers in ``home``; None if another is. Call the result to let go."""
    make_home(home)
    file = os.open(home / "up.pid", os.O_RDWR | os.O_CREAT, 0o600)
    if not _lock(file):
        os.close(file)
        return None
    _addresses_path(home).unlink(missing_ok=True)
    make_key_file(_key_path(home))
    os.ftruncate(file, 0)
    os.write(file, str(os.getpid()).encode())
    return lambda: os.close(file)


def _lock(file: int) -> bool:
    # A process that looks for a holder takes the lock for an instant: only one that keeps it is a holder.
    end_s = time.monotonic() + _GLANCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > end_s:
                return False
            time.sleep(_POLL_S)


def publish(home: Path, addresses: Addresses) -> None:
    """Let :func:`running` find the servers; whole or not at all."""
    write_private(_addresses_path(home), to_text(addresses))


def _addresses_path(home: Path) -> Path:
    return home / "servers.json"


def _key_path(home: Path) -> Path:
    return home / "key"


def holder(home: Path) -> int | None:
    """The process that runs private servers in ``home``, if one does; raises UsageError if it is another user's."""
    path = home / "up.pid"
    if os.path.exists(home):  # False as well where this process may not look
        refuse_foreign(home)
    if not os.path.exists(path):
        return None
    file = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        text = os.pread(file, 32, 0)
        return int(text) if text else None  # it has the lock, but has not written yet
    finally:
        os.close(file)
