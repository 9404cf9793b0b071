"""Which Redis is the master, as its Sentinels say.

They are asked whenever a connection is made: what one of them said before a failover is no answer after it. A Sentinel
that was away, or is cut off with the old master, still names that one; the number that grows with every failover (its
``config-epoch``) tells such an answer from a newer one.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from redis.utils import str_if_bytes

from psa_store.storage.addresses import HostPort


class Sentinels:
    """The Sentinels of one master. Thread-safe.

    Args:
        options: of connections to them, without host and port.
        timeout_s: how long each of them may take.
    """

    def __init__(self, hosts: tuple[HostPort, ...], name: str, options: Mapping[str, Any], timeout_s: float) -> None:
        self._hosts = list(hosts)
        self._name = name
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._failovers = -1
        """The highest number so far."""

    def master(self) -> HostPort:
        """Ask until one names the master; the first time all of them, since one may not know of the last failover yet.

        Raises:
            redis.exceptions.AuthenticationError: none names it, and one refuses our password.
            redis.exceptions.ConnectionError: none names it; says what each answered.
        """
        said: list[str] = []
        refused, is_first, found = False, self._failovers < 0, None
        for host in tuple(self._hosts):
            where = f"{host[0]}:{host[1]}"
            try:
                address, failovers = self._ask(host)
            except redis.exceptions.RedisError as error:
                refused = refused or isinstance(error, redis.exceptions.AuthenticationError)
                said.append(f"{where}: {error}")
                continue
            with self._lock:
                if failovers > self._failovers or (failovers == self._failovers and found is None):
                    self._failovers = failovers
                    self._hosts.remove(host)
                    self._hosts.insert(0, host)  # asked first the next time: those before it did not help
                    found = address
            if found is None:
                said.append(f"{where} does not know of the last failover")
            elif not is_first:
                break
        if found is not None:
            return found
        kind = redis.exceptions.AuthenticationError if refused else redis.exceptions.ConnectionError
        raise kind(f"no Sentinel names the master {self._name!r} ({'; '.join(said)})")

    def doubt(self) -> None:
        """Ask another one first the next time: what the last one named is no master, or is away.

        Of a failover the Sentinels learn within two seconds of each other.
        """
        with self._lock:
            self._hosts.append(self._hosts.pop(0))

    def _ask(self, host: HostPort) -> tuple[HostPort, int]:
        options = {"connection_class": redis.Connection, **self._options}
        pool = redis.ConnectionPool(
            host=host[0],
            port=host[1],
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=self._timeout_s,
            socket_connect_timeout=self._timeout_s,
            **options,
        )
        try:
            client: Any = redis.Redis(connection_pool=pool)
            failovers = int(client.execute_command("SENTINEL MASTER", self._name)["config-epoch"])
            # The Sentinel that carries a failover out says the new number while MASTER still tells of the old master.
            # Asked last: so the address is at least as new as the number.
            named = client.execute_command("SENTINEL GET-MASTER-ADDR-BY-NAME", self._name)
            if named is None:
                raise redis.exceptions.ResponseError("No such master with that name")
            return (str(str_if_bytes(named[0])), int(named[1])), failovers
        finally:
            pool.disconnect()
