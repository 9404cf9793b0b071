"""The key of the cluster: from a setting, or a file that is closed to others. Without it, servers stay on one host."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from psa_store.config import Settings, as_environment, check_bind, cluster_key, fill_addresses, load_settings
from psa_store.config.private_servers import Addresses, hold_home, publish
from psa_store.errors import UsageError

KEY = "canary of sixteen and more"


def a_file(folder: Path, text: str = KEY, mode: int = 0o600) -> Path:
    path = folder / "file of the key"
    path.write_text(text + "\n")
    path.chmod(mode)
    return path


def test_it_is_the_same_from_a_setting_and_from_a_file(tmp_path: Path) -> None:
    assert cluster_key(Settings(key=KEY)) == cluster_key(Settings(key_file=a_file(tmp_path))) == KEY.encode()
    assert cluster_key(Settings()) is None


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: Settings(key=KEY, key_file=a_file(folder)), "both PSA_KEY and PSA_KEY_FILE"),
        (lambda folder: Settings(key_file=folder / "none"), "No such file"),
        (lambda folder: Settings(key_file=a_file(folder, mode=0o644)), "other users can read it"),
        (lambda folder: Settings(key_file=a_file(folder, text="short")), "this has 5"),
    ],
    ids=["both", "missing", "open to others", "short"],
)
def test_what_cannot_be_a_key_is_one_clear_error(tmp_path: Path, make: Callable[[Path], Settings], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        cluster_key(make(tmp_path))


def test_it_is_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(key=KEY)
    assert KEY not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"
    assert as_environment(settings)["PSA_KEY"] == KEY, "other processes have it"
    monkeypatch.setenv("PSA_KEY", KEY[:5])
    with pytest.raises(UsageError, match=r"PSA_KEY: .*at least 16") as caught:
        load_settings()
    assert KEY[:5] not in str(caught.value)


@pytest.mark.parametrize("bind", ["0.0.0.0", "10.0.0.7", "::", "some.host"])
def test_servers_that_others_reach_want_one(bind: str) -> None:
    with pytest.raises(UsageError, match=f"PSA_BIND={bind}.*PSA_KEY or PSA_KEY_FILE"):
        check_bind(Settings(bind=bind))
    check_bind(Settings(bind=bind, key=KEY))


@pytest.mark.parametrize("bind", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_servers_of_this_machine_alone_do_not(bind: str) -> None:
    check_bind(Settings(bind=bind))


def test_private_servers_have_one_and_all_processes_find_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    let_go = hold_home(home)
    assert let_go is not None
    try:
        publish(home, Addresses("unix:///a", "127.0.0.1:1"))
        assert (home / "key").stat().st_mode & 0o777 == 0o600
        key = cluster_key(fill_addresses(Settings(home=home)))
        assert key is not None and len(key) == 64
        told = Settings(home=home, redis="unix:///a", zookeeper="127.0.0.1:1")
        assert cluster_key(fill_addresses(told)) == key
        others = Settings(home=home, redis="unix:///b", zookeeper="127.0.0.1:1")
        assert cluster_key(fill_addresses(others)) is None
        assert cluster_key(fill_addresses(Settings(home=home, key=KEY))) == KEY.encode()
    finally:
        let_go()
    again = hold_home(home)
    assert again is not None
    again()
    assert os.path.getsize(home / "key") == 65 and key.decode() in (home / "key").read_text()
