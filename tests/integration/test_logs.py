"""The log of real processes as JSON, with a Redis whose password must not appear."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from psa_store.launch import PrivateRedis
from tests.harness import TRAIN, Run, Site

PASSWORD = "Kdj4Qx@x9"


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    server = PrivateRedis(tmp_path_factory.mktemp("redis"), {"requirepass": PASSWORD}, tcp=True)
    server.start(120)
    host, port = server.address
    yield f"redis://:{PASSWORD}@{host}:{port}"
    server.stop()


def lines_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.lines if line.startswith("{")]


def test_every_process_of_a_run_logs_as_json_and_none_shows_the_password(site: Site, address: str) -> None:
    env = {**site.env, "PSA_REDIS": address, "PSA_LOG_LEVEL": "debug"}
    arguments = ["run", "--log-json", "--workers", "1", "--ranks", "2", "--commit-every", "5", str(TRAIN)]
    run = Run([*arguments, "--job", "logged", "--steps", "60"], env)
    run.wait_for_step(3)
    created = next(line for line in lines_of(run) if line["event"] == "job created")
    os.kill(created["pid"], signal.SIGKILL)
    assert run.finish() == 0, run.output
    assert not any(part in run.output for part in (PASSWORD, PASSWORD.partition("@")[0], PASSWORD.partition("@")[2]))
    found = lines_of(run)
    assert {line["role"] for line in found} == {"run", "worker", "server"}
    for line in found:
        assert list(line)[:5] == ["time", "level", "event", "role", "pid"]
        if line["role"] in ("worker", "server"):
            assert line["job"] == "logged" and line["member"].startswith(line["role"])
    died = next(line for line in found if line["event"] == "a process died: restarting")
    assert (died["level"], died["died"], died["job"]) == ("warning", created["member"], "logged")
    others = [line for line in run.lines if not line.startswith("{")]
    assert [line for line in others if not line.startswith("step ")] == ["finished 60"]


@pytest.mark.parametrize(
    ("command", "code"),
    [(["server", "--job", "none"], 3), (["worker", str(TRAIN), "--job", "none"], 3), (["run", str(TRAIN)], 3)],
)
def test_the_reason_of_an_end_is_a_line_as_well(site: Site, address: str, command: list[str], code: int) -> None:
    env = {"PSA_REDIS": "redis://me:Kdj4Qx@127.0.0.1:1", "PSA_CONNECT_TIMEOUT_S": "0.2"}
    done = site.told(command[0], "--log-json", *command[1:], env=env)
    assert done.returncode == code
    last = json.loads(done.stderr.splitlines()[-1])
    assert last["level"] == "error" and "redis://me:***@127.0.0.1:1 does not answer" in last["event"]
    assert last["role"] == command[0] and "Kdj4Qx" not in done.stdout + done.stderr


def test_an_exception_of_the_script_is_one_line_and_hides_the_password(
    site: Site, address: str, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os\nraise ValueError(f'no data at {os.environ[\"PSA_REDIS\"]}')\n")
    for flags in (["--log-json"], []):
        done = site.told("run", *flags, "--workers", 1, script, env={"PSA_REDIS": address})
        assert done.returncode == 1 and "Kdj4Qx" not in done.stderr and "no data at redis://:***@" in done.stderr
        if flags:
            failed = [json.loads(line) for line in done.stderr.splitlines()]
            assert any("ValueError: no data" in line.get("exception", "") for line in failed)
