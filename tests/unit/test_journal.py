"""The journal of a process: whole lines that survive it, nothing at all by default."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from psa_store.errors import UsageError
from psa_store.testing.journal import Journal, fingerprint_text


def test_what_was_recorded_survives_the_process(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from psa_store.testing.journal import Journal\n"
        f"journal = Journal(Path({str(tmp_path)!r}), 'worker', 'w')\n"
        "journal.record('pushed', step=3)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", script], timeout=300, check=False)
    assert done.returncode == -signal.SIGKILL
    begin, pushed = [json.loads(line) for line in (tmp_path / "worker-w.jsonl").read_text().splitlines()]
    assert begin["role"] == "worker" and begin["name"] == "w" and begin["pid"] != os.getpid()
    assert pushed["event"] == "pushed" and pushed["step"] == 3 and pushed["t"] >= begin["t"]


def test_without_a_folder_it_records_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(None, "worker", "w")
    journal.record("pushed")
    journal.close()
    assert not journal.enabled and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="PSA_JOURNAL"):
        Journal(tmp_path / "missing", "worker", "w")


def test_fingerprints_add_up_whatever_the_order() -> None:
    parts = [0xFFFF_FFFF_FFFF_FFFF, 5, 1 << 63]
    assert fingerprint_text(sum(parts)) == fingerprint_text(parts[2] + fingerprint_back(parts[0] + parts[1]))


def fingerprint_back(total: int) -> int:
    return int(fingerprint_text(total), 16)
