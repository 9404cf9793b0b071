"""Hide what must not be shown: passwords in addresses, and values whose name marks them as secret. Pure.

One place for everything that is printed: messages of errors, `psa config show`, and every line of the log.
"""

from __future__ import annotations

import re

HIDDEN = "***"
_IN_ADDRESS = re.compile(r"(?<=://)(?P<user>[^/@:\s]*):\S*@|(?P<key>[?&]password=)[^&\s]*", re.IGNORECASE)
"""Up to the last @ of the word, so that a password that should have been percent-encoded is hidden as well."""
_SECRET_NAME = re.compile(r"passw|secret|token|credential|api_?key|private_?key", re.IGNORECASE)
_SPACE = re.compile(r"\s")


def hide_passwords(text: str) -> str:
    """Return the text without the passwords of its addresses, ``scheme://user:password@…`` and ``?password=…``."""
    return _IN_ADDRESS.sub(
        lambda found: f"{found['key'] or found['user'] + ':'}{HIDDEN}{'' if found['key'] else '@'}", text
    )


def printable(url: str) -> str:
    """Return an address without its password, for messages; also one that is invalid for the spaces in it."""
    return hide_passwords(_SPACE.sub("%20", url))


def names_secret(name: str) -> bool:
    """Whether a value with this name must not be shown."""
    return _SECRET_NAME.search(name) is not None
