"""What a harness knows of a running job from its journals."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from chaos.tail import Tail


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_the_controller_is_who_was_elected_last_in_whatever_order_journals_are_read(
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
