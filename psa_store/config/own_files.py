"""Files and folders that are for this user alone: made so, and refused where others could have written them."""

from __future__ import annotations

import os
import pwd
import stat
from contextlib import suppress
from pathlib import Path

from psa_store.errors import UsageError

SAFE_DIRECTORY = "PSA_SAFE_DIRECTORY"
"""Folders (separated as in PATH) in which other users' scripts and settings are taken; ``*`` for all."""
_OTHERS = 0o077
_OTHERS_WRITE = 0o022


def private_folder(path: Path) -> Path:
    """Make a folder of our own inside one of our own, or close one that is there to others; returns it."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_mode & _OTHERS:
        path.chmod(0o700)
    return path


def short_lived_folder(path: Path) -> None:
    """Make a folder of our own in one that is open to all, as /tmp is.

    Raises:
        UsageError: another user was there first.
    """
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & _OTHERS:
        raise UsageError(f"{path} is not ours alone: remove it, or set PSA_HOME to a folder with a shorter path")


def private_home(path: Path, marks: tuple[str, ...]) -> Path:
    """Make a person's choice of a folder our own; returns it.

    One that is there is closed to others if it is empty or has one of the ``marks``, names of what we keep in it. A
    folder that is more than that, as /tmp is, keeps its mode.

    Raises:
        UsageError: it can not be made or written, belongs to another user, or others may write there.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from error
    refuse_foreign(path)
    if not os.access(path, os.W_OK | os.X_OK):
        raise _unwritable(path, "this process may not write there")
    mode = path.stat().st_mode
    if mode & _OTHERS and (any((path / mark).exists() for mark in marks) or not any(path.iterdir())):
        path.chmod(0o700)
    elif mode & _OTHERS_WRITE:
        raise UsageError(
            f"PSA_HOME={str(path)!r}: other users may write there. Use a folder of your own, "
            f"or close it: `chmod go-w {path}`"
        )
    return path


def _unwritable(home: Path, why: str) -> UsageError:
    return UsageError(
        f"PSA_HOME={str(home)!r} can not be used: {why}. Private servers keep their data there: set PSA_HOME to a "
        "folder that can be written, or PSA_REDIS and PSA_ZOOKEEPER to servers of your own"
    )


def refuse_foreign(home: Path) -> None:
    """Raise UsageError if the folder is another user's."""
    owner = home.stat().st_uid
    if owner != os.geteuid():
        raise UsageError(
            f"PSA_HOME={str(home)!r} belongs to {_user(owner)}, and this process is of {_user(os.geteuid())}: "
            "set PSA_HOME to a folder of your own"
        )


def write_private(path: Path, text: str) -> None:
    """Write a file that is closed to others; readers see it whole or not at all."""
    draft = path.with_name(f"{path.name}.draft")
    file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with open(file, "w") as stream:
        os.fchmod(file, 0o600)
        stream.write(text)
    draft.replace(path)


def private_opener(path: str, flags: int) -> int:
    """For ``open(…, opener=)``: a file that is made is closed to others."""
    return os.open(path, flags, 0o600)


def read_secret(path: Path) -> str:
    """The one line of a file that is closed to others.

    Raises:
        UsageError: it cannot be read, or others can.
    """
    try:
        with path.open() as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read().strip()
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from error
    if stat.S_ISREG(mode) and mode & _OTHERS:
        raise UsageError(f"{path}: other users can read it. Close it: `chmod 600 {path}`")
    return text


def refuse_foreign_settings(path: Path) -> None:
    """Raise UsageError if a file that is read without being named may be another user's work."""
    found = path.stat()
    problem = None
    if not _is_trusted(found.st_uid, path):
        problem = f"it belongs to {_user(found.st_uid)}"
    elif found.st_mode & stat.S_IWOTH and not _is_allowed(path):
        problem = "all users may write it"
    if problem is not None:
        raise UsageError(
            f"{path}: {problem}, and would decide for this process. If you trust it, name it (PSA_CONFIG={path}) "
            f"or its folder (PSA_SAFE_DIRECTORY={path.parent}); PSA_CONFIG= (empty) reads none"
        )


def refuse_foreign_script(path: Path) -> None:
    """Raise UsageError if a script is another user's, in a folder where others may write."""
    path = path.resolve()
    owner = path.stat().st_uid
    if path.parent.stat().st_mode & _OTHERS_WRITE and not _is_trusted(owner, path):
        raise UsageError(
            f"{path} belongs to {_user(owner)}, in a folder where others may write. If you trust what is in it, "
            f"allow it: PSA_SAFE_DIRECTORY={path.parent}"
        )


def _is_trusted(owner: int, path: Path) -> bool:
    """Whether what ``owner`` wrote may decide here: this user, root, and the user that called sudo."""
    return str(owner) in (str(os.geteuid()), "0", os.environ.get("SUDO_UID")) or _is_allowed(path)


def _is_allowed(path: Path) -> bool:
    folders = os.environ.get(SAFE_DIRECTORY, "").split(os.pathsep)
    return "*" in folders or any(folder and path.is_relative_to(Path(folder).resolve()) for folder in folders)


def _user(uid: int) -> str:
    try:
        return f"user {pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"
