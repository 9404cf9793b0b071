"""Hide what must not be shown: passwords in addresses, and values whose name marks them as secret. Pure.

One place for everything that is printed: messages of errors, `psa config show`, and every line of the log.
"""

from __future__ import annotations

import re

HIDDEN = "***"
_IN_ADDRESS = re.compile(
    r"(?<=://)(?P<user>[^/@:\s]*):\S*@|(?P<key>[?&](?:sentinel_)?password=)[^&\s]*"
    r"|(?<![\w.:/@-])(?P<name>[\w.%+-]+):(?!//)[^\s'\"@]+@(?=[\w.\[\]:-]+:\d)",
    re.IGNORECASE,
)
"""After ``://`` up to the last @ of the word, so that a password that should have been percent-encoded is hidden as
well; where there is no ``://``, as in ``user:password@host:port``, up to the @ before a host with its port."""
_SECRET_NAME = re.compile(r"passw|secret|token|credential|api_?key|private_?key", re.IGNORECASE)
_SPACE = re.compile(r"\s")


def hide_passwords(text: str) -> str:
    """Return the text without the passwords of its addresses.

    They are those of ``scheme://user:password@…``, ``?password=…`` and ``user:password@host:port``.
    """
    return _IN_ADDRESS.sub(_without_password, text)


def _without_password(found: re.Match[str]) -> str:
    if found["key"]:
        return f"{found['key']}{HIDDEN}"
    return f"{found['user'] or found['name'] or ''}:{HIDDEN}@"


def printable(url: str) -> str:
    """Return an address without its password, for messages; also one that is invalid for the spaces in it."""
    return hide_passwords(_SPACE.sub("%20", url))


def printable_hosts(address: str) -> str:
    """Return an address of the form ``user:password@host``, for messages; also one whose port is not given."""
    names, at, rest = address.rpartition("@")
    return f"{names.partition(':')[0]}:{HIDDEN}@{rest}" if at and ":" in names else address


def names_secret(name: str) -> bool:
    """Whether a value with this name must not be shown."""
    return _SECRET_NAME.search(name) is not None
