"""`psa chaos`: bad input gets one line and exit code 2, before anything is started."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from chaos import campaign
from chaos.scenarios import MATRIX, scenario
from psa_store.cli.chaos import chaos_list, seconds
from psa_store.errors import UsageError
from tests.harness import PSA


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    command = [*PSA, "chaos", "run", "--out", str(tmp_path / "out"), "--scenario", "kill-nothing"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "no scenario 'kill-nothing'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_scenario_that_does_not_exist_is_named_before_anything_is_started() -> None:
    with pytest.raises(UsageError, match="no scenario 'nope'"):
        campaign.rows_of(["kill-server", "nope"])


@pytest.mark.parametrize(("option", "text"), [("--duration", "10"), ("--every", "0s")])
def test_a_duration_has_a_unit_and_is_not_0(option: str, text: str) -> None:
    with pytest.raises(UsageError, match=f"{option} {text}: use a number and a unit"):
        seconds(option, text)


@pytest.mark.parametrize(("text", "expected"), [("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0)])
def test_durations(text: str, expected: float) -> None:
    assert seconds("--duration", text) == expected


def test_what_this_machine_cannot_play_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "namespaces_available", lambda: "network namespaces need root")
    assert campaign.playable([scenario("kill-server")]) == [scenario("kill-server")]
    with pytest.raises(UsageError, match=r"need root.*isolate-server"):
        campaign.playable([scenario("isolate-server")])


def test_the_list_names_every_scenario(capsys: pytest.CaptureFixture[str]) -> None:
    chaos_list()
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} == {*MATRIX, "soak"}
