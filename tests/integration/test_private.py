"""A private run is for its user alone: what another user of the machine reaches, and where its passwords stand."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chaos.neighbour import plain_client
from psa_store.config import Settings, fill_addresses
from tests.harness import PSA, TRAIN, Run

ROOT = Path(__file__).parents[2]
STRANGER = 54321
PROBE = """
import encodings.idna, json, os, socket, sys
from kazoo.client import KazooClient

user, paths, pids, zookeeper = json.loads(sys.stdin.read())
os.setgroups([])
os.setgid(user)
os.setuid(user)  # after the imports: it may not read where Python is installed
done = []

def attempt(what, do):
    try:
        do()
    except Exception:
        return
    done.append(what)

def connect(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

for path, kind in paths:
    if kind == "socket":
        attempt(f"connect {path}", lambda: connect(path))
    elif kind == "folder":
        attempt(f"list {path}", lambda: os.listdir(path))
        attempt(f"write {path}", lambda: os.mkdir(f"{path}/stranger"))
    else:
        attempt(f"read {path}", lambda: open(path, "rb").read())
        attempt(f"write {path}", lambda: open(path, "ab").close())
for pid in pids:
    attempt(f"environment {pid}", lambda: open(f"/proc/{pid}/environ").read())
for auth in (None, [("digest", "psa:guess")]):
    client = KazooClient(zookeeper, auth_data=auth)
    client.start(60)
    for path in ("/", "/psa", "/psa/private", "/psa/private/plan", "/psa/private/workers", "/zookeeper"):
        attempt(f"children {path}", lambda: client.get_children(path))
        attempt(f"get {path}", lambda: client.get(path))
        attempt(f"set {path}", lambda: client.set(path, b"{"))
        attempt(f"create {path}", lambda: client.create(f"{path.rstrip('/')}/stranger"))
    client.stop()
    client.close()
print(json.dumps(done))
"""


@pytest.fixture
def home() -> Iterator[Path]:
    """In a folder that is open to all, unlike those of pytest."""
    path = Path(tempfile.gettempdir()) / f"psa-test-private-{secrets.token_hex(4)}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def reached(user: int, seen: list[Any]) -> list[str]:
    """What a process of that user could do."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        input=json.dumps([user, *seen]),
        cwd="/",
        env={"HOME": "/nonexistent"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[str] = json.loads(done.stdout)
    return found


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to act as another user")
def test_another_user_reaches_nothing_and_the_passwords_stand_in_closed_files_alone(home: Path) -> None:
    canaries = {"redis": f"canary-{secrets.token_hex(8)}", "zookeeper-1": f"canary-{secrets.token_hex(8)}"}
    for name, canary in canaries.items():
        folder = home / name
        folder.mkdir(mode=0o700, parents=True)
        (folder / "password").touch(0o600)
        (folder / "password").write_text(canary)
    home.chmod(0o755)  # as an earlier release left it
    logs = home / "logs"
    env = {"PSA_HOME": str(home), "PSA_LOG_LEVEL": "debug", "PSA_LOG_DIR": str(logs), "PSA_SESSION_TIMEOUT_S": "4"}
    end = home / "end"
    command = ["run", "--workers", "1", "--ranks", "2", "--commit-every", "5", str(TRAIN), "--job", "private"]
    run = Run([*command, "--steps", "40", "--end-after", str(end)], env, end)
    run.wait_for_step(3)
    settings = fill_addresses(Settings(home=home))
    assert settings.zookeeper is not None and settings.redis is not None
    assert canaries["redis"] in settings.redis and canaries["zookeeper-1"] in settings.zookeeper

    status = json.loads(psa("status", "private", "--json", env=env))
    os.kill(status["servers"][0]["pid"], signal.SIGKILL)  # messages about failures are looked at as well
    run.wait_for_line(lambda line: "a process died: restarting" in line)

    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and of_run(entry, home, run)]
    assert len(pids) > 5
    paths = [(str(path), kind(path)) for path in (home, *home.rglob("*"))]
    assert {each for _, each in paths} == {"socket", "folder", "file"}
    seen = [paths, pids, settings.zookeeper.rpartition("@")[2]]
    assert len(reached(0, seen)) > 20, "the probe can"
    assert reached(STRANGER, seen) == []
    client = plain_client(settings.zookeeper)
    client.start(60)
    tree = ["/psa", *(f"/psa/private/{name}" for name in client.get_children("/psa/private"))]
    assert all(client.get_acls(path)[0] == client.default_acl for path in tree)
    client.stop()
    client.close()

    arguments = [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids]
    texts = [psa("status", "private", env=env), psa("config", "show", env=env), psa("report", "private", env=env)]
    texts += [psa("doctor", env=env, code=None), json.dumps(status)]
    assert list(logs.glob("*.html"))
    assert run.finish() == 0, run.output
    texts.append(run.output)
    for canary in (*canaries.values(), (home / "key").read_text().strip()):
        assert not any(canary.encode() in each for each in arguments)
        assert not any(canary in each for each in texts)
        holding = [path for path in home.rglob("*") if path.is_file() and canary.encode() in path.read_bytes()]
        assert {path.name for path in holding} <= {"password", "redis.conf", "servers.json", "key"}
        assert holding
        assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in holding)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def psa(*arguments: str, env: dict[str, str], code: int | None = 0) -> str:
    done = subprocess.run(
        [*PSA, *arguments],
        cwd=env["PSA_LOG_DIR"],  # where the report's page goes
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert code is None or done.returncode == code, done.stderr
    return done.stdout + done.stderr


def kind(path: Path) -> str:
    mode = path.lstat().st_mode
    return "socket" if stat.S_ISSOCK(mode) else "folder" if stat.S_ISDIR(mode) else "file"


def of_run(entry: Path, home: Path, run: Run) -> bool:
    try:
        return os.getsid(int(entry.name)) == run.pid or str(home).encode() in (entry / "cmdline").read_bytes()
    except OSError:
        return False


SHADOWS = ("tenacity", "structlog", "kazoo", "redis", "prometheus_client", "xxhash", "safetensors", "fsspec", "queue")
SCRIPT = """
import sys

import beside
import torch

import psa_store as psa

assert sys.path[0] == beside.FOLDER
model = torch.nn.Linear(2, 1)
with psa.Worker(sys.argv[1], model, optimizer=psa.optim.SGD(lr=0.1), steps=40) as worker:
    for x in worker.batches(torch.utils.data.TensorDataset(torch.ones(64, 2)), batch_size=4):
        loss = model(x[0]).square().mean()
        loss.backward()
        worker.step(loss)
        print(f"step {worker.version}", flush=True)
        if worker.version == 5:
            beside.wait_for(sys.argv[2])
"""
BESIDE = """
import os
import time

FOLDER = os.path.dirname(__file__)

def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.02)  # the test makes the file: another process's file sends no event
"""


def test_two_runs_of_one_home_share_its_servers_and_the_second_goes_on_without_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where they are started, and beside their script, lie files that have the names of libraries."""
    monkeypatch.chdir(tmp_path)
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write(__name__)\n")
    (tmp_path / "beside.py").write_text(BESIDE)
    (tmp_path / "script.py").write_text(SCRIPT)
    env = {"PSA_HOME": str(tmp_path / "home"), "PSA_SESSION_TIMEOUT_S": "4"}
    ends = [tmp_path / "first", tmp_path / "second"]
    runs = [Run(["run", "--workers", "1", "script.py", end.name, str(end)], env, end) for end in ends]
    for each in runs:
        each.wait_for_step(3)
    starter, other = sorted(runs, key=lambda each: "private Redis and ZooKeeper" not in each.output)
    assert "private Redis and ZooKeeper" not in other.output
    assert starter.finish() == 0, starter.output
    other.wait_for_line(lambda line: "has ended: they run from here now" in line)
    assert other.finish() == 0, other.output
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()
