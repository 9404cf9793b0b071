"""What a harness knows of a running job from its journals."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from chaos.tail import Tail


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_the_controller_is_the_server_elected_last_in_whatever_order_journals_are_read(
    tmp_path: Path, names: tuple[str, str]
) -> None:
    """Found by soak, seed 7: two elections between two looks, and the dead controller's was read after the other."""
    for t, name in enumerate(names):
        events = [
            {"t": t, "event": "begin", "role": "server", "name": name, "pid": os.getpid()},
            {"t": t + 0.5, "event": "elected", "member": name},
        ]
        (tmp_path / f"server-{name}.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))
    tail = Tail(tmp_path)
    tail.look()
    controller = tail.controller()
    assert controller is not None and controller.name == names[1]


def test_a_process_that_is_gone_does_not_live_although_another_may_have_its_pid(tmp_path: Path) -> None:
    """Found by a soak: pids came round again after 49 minutes, and the harness killed ZooKeeper for a server."""
    with subprocess.Popen(["sleep", "60"]) as child:
        (tmp_path / "server-a.jsonl").write_text(
            json.dumps({"t": 1.0, "event": "begin", "role": "server", "name": "a", "pid": child.pid}) + "\n"
        )
        tail = Tail(tmp_path)
        tail.look()
        (process,) = tail.living("server")
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.lives, "a zombie"
    assert not process.lives and tail.living("server") == []
