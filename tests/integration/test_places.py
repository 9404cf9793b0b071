"""Where psa may be told to live: homes that are not ASCII, or none; folders that can not be written; no locale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from psa_store.errors import DependencyUnreachable
from psa_store.launch import PrivateRedis, PrivateZooKeeper
from tests.harness import PATIENCE_S, Site

UNKNOWN_USER = """
import os, pwd, sys
os.environ.pop("HOME", None)

def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")

pwd.getpwuid = unknown  # as for a uid that has no entry
"""
COMMAND = "from psa_store.cli.app import main\nsys.argv = ['psa', *sys.argv[1:]]\nmain()\n"


def alone(program: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """A Python process that knows nothing of this one's servers."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("PSA_")}
    return subprocess.run(
        [sys.executable, "-P", "-c", program, *arguments],
        env={**around, **env},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )


def test_without_a_home_the_package_is_imported_and_a_command_says_what_to_set() -> None:
    assert alone(f"{UNKNOWN_USER}\nimport psa_store, psa_store.server.main, psa_store.worker").returncode == 0
    up = alone(UNKNOWN_USER + COMMAND, "up")
    assert up.returncode == 2 and "set PSA_HOME to a folder that can be written" in up.stderr
    assert "Traceback" not in up.stderr
    asked = alone(UNKNOWN_USER + COMMAND, "status")
    assert asked.returncode == 2 and "psa up" in asked.stderr and "Traceback" not in asked.stderr
    of_tilde = alone(UNKNOWN_USER + COMMAND, "status", PSA_HOME="~/here")
    assert of_tilde.returncode == 2 and "no home folder" in of_tilde.stderr and "Traceback" not in of_tilde.stderr


def test_importing_the_package_writes_nothing_and_connects_to_nothing(tmp_path: Path) -> None:
    watched = """
import os, sys
done = []

def hook(event, arguments):
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in ("os.mkdir", "os.remove", "os.rename", "socket.connect", "socket.bind", "subprocess.Popen"):
        done.append((event, arguments))

sys.addaudithook(hook)
import psa_store
psa_store.Worker, psa_store.Store, psa_store.optim.AdamW
print([each for each in done if "psa" in str(each)])
"""
    imported = alone(watched, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert imported.returncode == 0, imported.stderr
    assert imported.stdout.strip() == "[]" and not any(tmp_path.iterdir())


def test_a_job_with_servers_of_its_own_needs_no_home(site: Site) -> None:
    asked = alone(UNKNOWN_USER + COMMAND, "status", PSA_REDIS=site.redis, PSA_ZOOKEEPER=site.zookeeper)
    assert asked.returncode == 0, asked.stderr


def test_a_home_that_can_not_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    up = alone("import sys\n" + COMMAND, "up", PSA_HOME=str(tmp_path / "file" / "home"))
    assert up.returncode == 2 and len(up.stderr.splitlines()) == 1 and "can not be used" in up.stderr
    up = alone("import sys\n" + COMMAND, "up", PSA_HOME="/proc/psa")  # also for root nothing can be made there
    assert up.returncode == 2 and len(up.stderr.splitlines()) == 1 and "/proc/psa" in up.stderr


@pytest.mark.parametrize("locale", ["C", ""])
def test_private_servers_in_a_home_that_is_not_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    monkeypatch.setenv("LC_ALL", locale)
    home = tmp_path / "Zoë's Ordner = ключ"
    zookeeper, redis = PrivateZooKeeper(home / "zookeeper"), PrivateRedis(home / "redis")
    try:
        zookeeper.start(PATIENCE_S)
        redis.start(PATIENCE_S)
        assert (home / "zookeeper" / "data0" / "version-2").is_dir()
    finally:
        zookeeper.stop()
        redis.stop()


def test_a_zookeeper_from_a_tarball(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its jars lie together in ``lib``; here they are those that are installed."""
    jars = tmp_path / "apache-zookeeper" / "lib"
    jars.mkdir(parents=True)
    monkeypatch.setenv("ZOOKEEPER_HOME", str(jars.parent))
    zookeeper = PrivateZooKeeper(tmp_path / "zookeeper")
    with pytest.raises(DependencyUnreachable, match=r"ZOOKEEPER_HOME=.*zookeeper\*\.jar"):
        zookeeper.start(PATIENCE_S)
    for name in ("zookeeper.jar", "slf4j-simple.jar"):
        (jars / name).symlink_to(Path("/usr/share/java") / name)
    try:
        zookeeper.start(PATIENCE_S)
        assert str(jars) in Path(f"/proc/{zookeeper.pids[0]}/cmdline").read_text()
    finally:
        zookeeper.stop()
