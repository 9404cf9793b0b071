"""A home and what lies in it are for one user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from psa_store.config import running
from psa_store.config.own_files import private_folder, private_home, write_private
from psa_store.config.private_servers import hold_home
from psa_store.errors import UsageError

MARKS = ("up.pid",)
AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_home_is_closed(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        assert mode(private_home(tmp_path / "a" / "home", MARKS)) == 0o700
    finally:
        os.umask(former)


@pytest.mark.parametrize("inside", [None, "up.pid"])
def test_one_that_is_empty_or_was_a_home_is_closed(tmp_path: Path, inside: str | None) -> None:
    tmp_path.chmod(0o777)
    if inside is not None:
        (tmp_path / inside).touch()
    assert mode(private_home(tmp_path, MARKS)) == 0o700


def test_a_folder_of_other_things_keeps_its_mode_and_must_not_be_writable_by_others(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    tmp_path.chmod(0o755)
    assert mode(private_home(tmp_path, MARKS)) == 0o755
    tmp_path.chmod(0o1777)
    with pytest.raises(UsageError, match="other users may write there"):
        private_home(tmp_path, MARKS)
    assert mode(tmp_path) == 0o1777


@AS_ROOT
def test_the_home_of_another_user_is_refused_by_name(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    os.chown(home, 54321, -1)
    for use in (running, hold_home):
        with pytest.raises(UsageError, match=f"PSA_HOME='{home}' belongs to uid 54321"):
            use(home)


def test_what_is_written_is_closed_even_if_it_was_open_before(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o755)
    assert mode(private_folder(folder)) == 0o700
    path = folder / "password"
    path.touch(0o666)
    write_private(path, "secret")
    assert (mode(path), path.read_text(), [each.name for each in folder.iterdir()]) == (0o600, "secret", ["password"])
