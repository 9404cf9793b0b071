"""What each member of a ZooKeeper ensemble is like, asked one by one. For people; nothing is written.

For `psa doctor` a member is asked twice, for `psa status` only the first of these. ``srvr``, one of ZooKeeper's
four-letter words, is answered by a member that has no quorum as well, which tells it from one that is down, and names
its version and its part in the ensemble. A session is granted by a quorum only, so that a member which gives us one
serves.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace

from psa_store.coordination.access import Access, as_access
from psa_store.coordination.client import four_letters
from psa_store.coordination.session import Session
from psa_store.coordination.znodes import Znodes
from psa_store.errors import DependencyUnfit, DependencyUnreachable, Disconnected

_ROUND_TRIPS = 15
_ASKED_AT_ONCE = 8
_NO_QUORUM = "not currently serving"
_VERSION = re.compile(r"^Zookeeper version: (\d+(?:\.\d+)*)", re.MULTILINE)
_MODE = re.compile(r"^Mode: (\w+)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ZooKeeperMember:
    """One address of the connect string, and what answered there."""

    address: str
    problem: str = ""
    """Why it does not serve; empty if it does."""
    version: str = ""
    mode: str = ""
    """standalone, leader, follower or observer; like the version, empty if it does not tell."""
    granted_s: float = 0.0
    """Session timeout that it granted."""
    round_trips_s: Sequence[float] = ()
    """Each through this member to the leader and back."""

    @property
    def serves(self) -> bool:
        return not self.problem


def examine_zookeeper(
    where: Access | str, *, session_timeout_s: float, connect_timeout_s: float
) -> list[ZooKeeperMember]:
    """Ask every address ("host:port,host:port/chroot"), in their order.

    Raises:
        UsageError: the address cannot be read.
    """
    access = as_access(where)
    return _ask_each(access, lambda each: _examine(each, access.root, session_timeout_s, connect_timeout_s))


def probe_zookeeper(where: Access | str, timeout_s: float) -> list[ZooKeeperMember]:
    """The same from one short question to each, without a session: nothing is known of how fast it is.

    A member that is silent for ``timeout_s``, as a stopped process is, does not serve.

    Raises:
        UsageError: the address cannot be read.
    """
    return _ask_each(where, lambda each: _ask_srvr(each, timeout_s))


def _ask_each(where: Access | str, ask: Callable[[Access], ZooKeeperMember]) -> list[ZooKeeperMember]:
    access = as_access(where)
    members = [access.member(host, port) for host, port in access.addresses]
    with ThreadPoolExecutor(_ASKED_AT_ONCE, thread_name_prefix="psa-zookeeper-ask") as pool:
        return list(pool.map(ask, members))


def _ask_srvr(member: Access, timeout_s: float) -> ZooKeeperMember:
    address = member.hosts
    tls = member.tls.context() if member.tls is not None else None
    try:
        answer = four_letters(member.addresses[0], b"srvr", timeout_s, tls)
    except OSError as error:
        return ZooKeeperMember(address, f"no connection: {error.strerror or error}")
    if not answer:
        return ZooKeeperMember(address, f"it accepts connections, but says nothing within {timeout_s:g} s")
    if _NO_QUORUM in answer:
        return ZooKeeperMember(address, "it runs, but without a quorum")
    version, mode = (found[1] if (found := pattern.search(answer)) else "" for pattern in (_VERSION, _MODE))
    return ZooKeeperMember(address, "", version, mode)


def _examine(member: Access, root: str, session_timeout_s: float, connect_timeout_s: float) -> ZooKeeperMember:
    answered = _ask_srvr(member, connect_timeout_s)
    if not answered.serves:
        return answered
    session = Session(
        member, session_timeout_s=session_timeout_s, connect_timeout_s=connect_timeout_s, wake=lambda: None
    )
    try:
        with closing(session):
            session.start()
            session.run(lambda znodes: znodes.children(root))
            trips_s = [session.run(_round_trip) for _ in range(_ROUND_TRIPS)]
            return replace(answered, granted_s=session.granted_s, round_trips_s=tuple(trips_s))
    except DependencyUnfit as error:
        return replace(answered, problem=str(error))
    except (DependencyUnreachable, Disconnected):
        return replace(answered, problem=f"it gives no session within {connect_timeout_s:g} s")


def _round_trip(znodes: Znodes) -> float:
    started_s = time.perf_counter()
    znodes.sync()
    return time.perf_counter() - started_s
