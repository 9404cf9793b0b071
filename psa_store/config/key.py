"""The key of the cluster: a secret that every process of its jobs has, and that none shows.

It is handed on in the environment and in a file, never in an argument, and is written nowhere else.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from psa_store.config.listening import is_loopback
from psa_store.config.own_files import read_secret, write_private
from psa_store.config.settings import KEY_CHARACTERS_MIN, Settings
from psa_store.errors import UsageError

_NEW_BYTES = 32
_FILE_BYTES_MAX = 4096
_HOW_TO_MAKE = "python -c 'import secrets; print(secrets.token_hex(32))'"


def cluster_key(settings: Settings) -> bytes | None:
    """Return the key; None: there is none.

    Raises:
        UsageError: it is said twice, or the file cannot be read, is readable to all, or holds no key.
    """
    if settings.key is not None:
        if settings.key_file is not None:
            raise UsageError("both PSA_KEY and PSA_KEY_FILE are set (in psa.toml: key, key_file): set one of them")
        return settings.key.get_secret_value().encode()
    return None if settings.key_file is None else _read(settings.key_file)


def check_bind(settings: Settings) -> None:
    """Refuse to let other machines reach servers that ask for no key.

    Raises:
        UsageError: ``bind`` is not an address of this machine alone, and there is no key.
    """
    if not is_loopback(settings.bind) and cluster_key(settings) is None:
        raise UsageError(
            f"PSA_BIND={settings.bind}: other machines reach servers there, and any process could change the job. "
            f"Make a key once ({_HOW_TO_MAKE}), and set PSA_KEY or PSA_KEY_FILE to it on every machine of the job"
        )


def make_key_file(path: Path) -> None:
    """Write a new key into a file that its owner alone can read, unless there is one. One process calls it at a time.

    It is there whole or not at all.
    """
    if not path.exists():
        write_private(path, secrets.token_hex(_NEW_BYTES) + "\n")


def _read(path: Path) -> bytes:
    key = read_secret(path).encode()
    if not KEY_CHARACTERS_MIN <= len(key) <= _FILE_BYTES_MAX:
        raise UsageError(
            f"{path}: a key has {KEY_CHARACTERS_MIN} to {_FILE_BYTES_MAX} bytes, and this has {len(key)}. "
            f"Make one: {_HOW_TO_MAKE}"
        )
    return key
