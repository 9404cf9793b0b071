"""A home and what lies in it are for one user alone."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from psa_store.cli.options import check_script
from psa_store.config import load_settings, running
from psa_store.config.own_files import SAFE_DIRECTORY, private_folder, private_home, write_private
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


class TestFilesOfOthers:
    @pytest.fixture(autouse=True)
    def apart(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("PSA_CONFIG", SAFE_DIRECTORY, "SUDO_UID"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.chdir(tmp_path)

    @AS_ROOT
    def test_settings_of_another_user_are_refused_unless_they_are_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "psa.toml").write_text("server_threads = 5\n")
        assert load_settings().server_threads == 5
        os.chown("psa.toml", 54321, -1)
        with pytest.raises(UsageError, match=r"psa\.toml: it belongs to uid 54321.*PSA_SAFE_DIRECTORY"):
            load_settings()
        for name, value in [
            ("PSA_CONFIG", "psa.toml"),
            ("SUDO_UID", "54321"),
            (SAFE_DIRECTORY, f"/nowhere:{tmp_path}"),
            (SAFE_DIRECTORY, "*"),
        ]:
            with monkeypatch.context() as context:
                context.setenv(name, value)
                assert load_settings().server_threads == 5

    def test_settings_that_all_may_write_are_refused(self, tmp_path: Path) -> None:
        (tmp_path / "psa.toml").touch()
        (tmp_path / "psa.toml").chmod(0o666)
        with pytest.raises(UsageError, match="all users may write it"):
            load_settings()

    @AS_ROOT
    def test_a_script_of_another_user_in_an_open_folder_is_refused_unless_it_is_allowed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        script = tmp_path / "train.py"
        script.touch()
        check_script(str(script), module=False)
        os.chown(script, 54321, -1)
        check_script(str(script), module=False)  # in a folder that is closed to others: this user put it there
        tmp_path.chmod(0o1777)
        with pytest.raises(UsageError, match="belongs to uid 54321, in a folder where others may write"):
            check_script("train.py", module=False)
        monkeypatch.setenv(SAFE_DIRECTORY, str(tmp_path))
        check_script("train.py", module=False)
