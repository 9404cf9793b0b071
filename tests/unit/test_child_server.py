"""A server program as a child process: what it is given of ours."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from psa_store.launch.child import ChildServer

PATIENCE_S = 60.0


def test_a_server_program_is_not_given_the_key_and_passwords_of_psa(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PSA_KEY", "a canary")
    monkeypatch.setenv("PSA_REDIS", "redis://:canary@127.0.0.1")
    monkeypatch.setenv("JVMFLAGS", "-Xmx64m")
    child, end_s = ChildServer("environment", tmp_path), time.monotonic() + PATIENCE_S
    log = tmp_path / "environment.log"
    child.start(["sh", "-c", "env; echo that is all; exec sleep 1000"], end_s)
    try:
        child.wait_until(lambda: "that is all" in log.read_text(), end_s, "env")
    finally:
        child.kill()
    given = log.read_text().splitlines()
    assert "JVMFLAGS=-Xmx64m" in given and any(line.startswith("PATH=") for line in given)
    assert not [line for line in given if "PSA_" in line or "canary" in line]
