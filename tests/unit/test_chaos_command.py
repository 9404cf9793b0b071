"""`psa chaos`: bad input gets one line and exit code 2, before anything is started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chaos import campaign
from chaos.scenarios import MATRIX, scenario
from psa_store.cli.chaos import seconds
from psa_store.errors import UsageError
from tests.harness import PSA


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--scenario", "kill-nothing"], "no scenario 'kill-nothing'"),
        (["--scenario", "kill-server,nope"], "no scenario 'nope'"),
        (["--duration", "10"], "--duration 10: use a number and a unit"),
        (["--duration", "1m", "--every", "0s"], "--every 0s: use a number and a unit"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    command = [*PSA, "chaos", "run", "--out", str(tmp_path / "out"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "expected"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)])
def test_durations(text: str, expected: float) -> None:
    assert seconds("--duration", text) == expected


def test_what_this_machine_cannot_play_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "namespaces_available", lambda: "network namespaces need root")
    assert campaign.playable([scenario("kill-server")]) == [scenario("kill-server")]
    with pytest.raises(UsageError, match=r"need root.*isolate-server"):
        campaign.playable([scenario("isolate-server")])


def test_the_list_names_every_scenario() -> None:
    done = subprocess.run([*PSA, "chaos", "list"], capture_output=True, text=True, timeout=300, check=True)
    assert {line.split()[0] for line in done.stdout.splitlines()} == {*MATRIX, "soak"}
