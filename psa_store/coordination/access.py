"""Where ZooKeeper is, and as what this process enters it. The one place that reads such an address.

``user:password@host:port,host:port/chroot``: user and password are a digest, which ZooKeeper does not check by itself;
they are what the znodes that we create are open to, and nothing else is. Without them znodes are open to all.
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

from kazoo.hosts import collect_hosts

from psa_store.config import Settings
from psa_store.config.own_files import read_secret
from psa_store.config.private_servers import known_zookeeper
from psa_store.errors import UsageError
from psa_store.logs import printable_hosts

_FORM = (
    "write host:port,host:port/chroot, or user:password@host:port/chroot "
    "with '/', '@' and '%' of user and password percent-encoded"
)


@dataclass(frozen=True, slots=True)
class Tls:
    """Files (PEM) of a connection by TLS: what signed the server's certificate, and our own certificate, if any."""

    ca: Path
    cert: Path | None = None
    key: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises UsageError if a file cannot be used."""
        try:
            context = ssl.create_default_context(cafile=str(self.ca))
            if self.cert is not None:
                context.load_cert_chain(self.cert, self.key)
        except OSError as error:
            files = ", ".join(str(path) for path in (self.ca, self.cert, self.key) if path is not None)
            raise UsageError(f"TLS for ZooKeeper, of {files}: {error}") from error
        return context


@dataclass(frozen=True, slots=True)
class Access:
    """``hosts``: "host:port,host:port". Its text is for people, and has neither user nor password."""

    hosts: str
    chroot: str = ""
    """Empty, or with a slash before each part."""
    user: str = ""
    password: str = field(default="", repr=False)
    tls: Tls | None = None

    def __str__(self) -> str:
        return self.hosts + self.chroot

    @property
    def root(self) -> str:
        """The znode below which all of ours are."""
        return f"{self.chroot}/psa"

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Each host with its port."""
        found: list[tuple[str, int]] = collect_hosts(self.hosts)[0]
        return found

    def member(self, host: str, port: int) -> Access:
        """The same for one of the hosts, without the chroot."""
        return replace(self, hosts=f"[{host}]:{port}" if ":" in host else f"{host}:{port}", chroot="")


def as_access(address: Access | str) -> Access:
    """Read an address as PSA_ZOOKEEPER has it; raises UsageError, without its password."""
    if isinstance(address, Access):
        return address
    rest, _, chroot = address.partition("/")
    names, at, hosts = rest.rpartition("@")
    user, colon, password = names.partition(":")
    if at and not (user and colon and password):
        raise UsageError(f"PSA_ZOOKEEPER={printable_hosts(address)!r}: user and password are incomplete; {_FORM}")
    parts = [part for part in chroot.split("/") if part]
    found = Access(hosts, "".join(f"/{part}" for part in parts), unquote(user), unquote(password))
    if ":" in found.user:
        raise UsageError(f"PSA_ZOOKEEPER={printable_hosts(address)!r}: the user must not have a ':'")
    try:
        if not hosts or not found.addresses:
            raise ValueError("it names no host")
    except ValueError as error:
        # Kazoo quotes what stands where the port should be, which may be half of the password.
        why = "no host:port" if "@" in address else str(error)
        raise UsageError(f"PSA_ZOOKEEPER={printable_hosts(address)!r}: {why}; {_FORM}") from None
    return found


def access_of(settings: Settings) -> Access:
    """The ZooKeeper of the settings, else the private one that runs.

    Raises:
        UsageError: neither is known, or the address or a file that the settings name cannot be used.
    """
    access = as_access(known_zookeeper(settings))
    if not access.user and settings.zookeeper_credentials is not None:
        user, colon, password = read_secret(settings.zookeeper_credentials).partition(":")
        if not (user and colon and password):
            raise UsageError(f"{settings.zookeeper_credentials}: one line user:password is expected")
        access = replace(access, user=user, password=password)
    if settings.zookeeper_ca is not None:
        tls = Tls(settings.zookeeper_ca, settings.zookeeper_cert, settings.zookeeper_key)
        tls.context()
        return replace(access, tls=tls)
    if settings.zookeeper_cert is not None or settings.zookeeper_key is not None:
        raise UsageError("PSA_ZOOKEEPER_CERT and PSA_ZOOKEEPER_KEY go with PSA_ZOOKEEPER_CA: set all of them")
    return access
