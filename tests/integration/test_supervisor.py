"""The supervisor of `psa run`: children that die come back, those that are told to leave do, nothing stays behind."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from psa_store.cluster import ProcessRole
from psa_store.launch import (
    Child,
    Supervisor,
    supervisor,
)
from psa_store.wire import announce
from tests.integration.processes import GONE_S, PATIENCE_S, ends_within, python, read_line

# What children do. They are found by name in the child, so they live at the top of this module.


def say(**more: Any) -> None:
    document = {"member": os.environ["PSA_MEMBER"], "pid": os.getpid(), "parent": os.getppid(), **more}
    announce(Path(os.environ["PSA_SUPERVISOR"]), document)


def wait_for_the_end() -> None:
    say()
    signal.pause()


def leave_cleanly() -> None:
    """Take a while to leave, as a worker does that finishes its step."""

    def leave(_number: int, _frame: object) -> None:
        time.sleep(0.3)  # the work that is left when the signal comes, not a wait for an event
        sys.exit(0)

    signal.signal(signal.SIGTERM, leave)
    wait_for_the_end()


def refuse_to_leave() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say()
    while True:
        signal.pause()


def leave_with(code: int) -> None:
    sys.exit(code)


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise ValueError("this one is meant to be seen in the output")


def look_around() -> None:
    say(mark=os.environ["MARK"], stdin=sys.stdin.read(), sigterm=signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)


class Watch:
    """A supervisor, and what it told us."""

    def __init__(self, restarts_max: int = 10) -> None:
        self.messages: list[dict[str, Any]] = []
        self.deaths: list[tuple[str, int]] = []
        self.died_s: list[float] = []
        self.react: Callable[[dict[str, Any]], None] = lambda _message: None
        self.supervisor = Supervisor(
            preload=["psa_store.worker"],
            restarts_max=restarts_max,
            env={"MARK": "42"},
            on_exit=self._on_exit,
            on_message=self._on_message,
        )

    def run(self, messages: int = 1 << 30) -> int:
        """Run until so many messages came, or no child is left."""
        end_s = time.monotonic() + PATIENCE_S

        def enough() -> bool:
            assert time.monotonic() < end_s, "it did not happen in time"
            return len(self.messages) >= messages or not self.supervisor.alive(ProcessRole.WORKER)

        return self.supervisor.run(until=enough)

    def _on_exit(self, child: Child) -> None:
        self.died_s.append(time.monotonic())
        self.deaths.append((child.member, child.exit_code))

    def _on_message(self, message: dict[str, Any]) -> None:
        self.messages.append(message)
        self.react(message)


@pytest.fixture
def watch() -> Iterator[Watch]:
    with closing_watch(10) as it:
        yield it


@contextlib.contextmanager
def closing_watch(restarts_max: int) -> Iterator[Watch]:
    it = Watch(restarts_max)
    try:
        yield it
    finally:
        it.supervisor.close()


class TestSupervisor:
    def test_a_child_has_its_environment_no_input_and_default_signals(self, watch: Watch) -> None:
        child = watch.supervisor.spawn(ProcessRole.WORKER, look_around)
        assert watch.run() == 0
        (message,) = watch.messages
        assert message["member"] == child.member
        assert (message["mark"], message["stdin"], message["sigterm"]) == ("42", "", True)
        assert watch.deaths == [(child.member, 0)]

    def test_a_killed_child_is_noticed_at_once_and_comes_back_under_another_name(
        self, watch: Watch, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(supervisor, "_TICK_S", 10.0)  # nothing below may depend on polling
        killed_s: list[float] = []

        def kill(message: dict[str, Any]) -> None:
            killed_s.append(time.monotonic())
            os.kill(message["pid"], signal.SIGKILL)

        watch.react = kill
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        assert watch.run(messages=6) == 0
        members = [message["member"] for message in watch.messages]
        assert len(set(members)) == 6
        assert watch.deaths == [(member, -signal.SIGKILL) for member in members[:5]]
        noticed_s = [died - killed for died, killed in zip(watch.died_s, killed_s, strict=False)]
        assert statistics.median(noticed_s) < supervisor._TICK_S / 2, noticed_s

    def test_deaths_beyond_the_budget_end_the_run(self) -> None:
        with closing_watch(restarts_max=2) as watch:
            watch.supervisor.spawn(ProcessRole.WORKER, be_killed)
            assert watch.run() == 1
            assert [code for _, code in watch.deaths] == [-signal.SIGKILL] * 3

    def test_an_unreachable_dependency_is_tried_again_within_the_budget(self) -> None:
        with closing_watch(restarts_max=2) as watch:
            watch.supervisor.spawn(ProcessRole.WORKER, leave_with, 3)
            assert watch.run() == 3
            assert [code for _, code in watch.deaths] == [3] * 3

    @pytest.mark.parametrize(("status", "code"), [(1, 1), (2, 2), (4, 4), (-1, 1)])
    def test_an_error_that_will_not_pass_ends_the_run(self, watch: Watch, status: int, code: int) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, leave_with, status)
        assert watch.run() == code
        assert len(watch.deaths) == 1

    def test_an_exception_ends_the_run(self, watch: Watch, capfd: pytest.CaptureFixture[str]) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, fail)
        assert watch.run() == 1
        assert len(watch.deaths) == 1

    def test_stop_waits_for_children_that_leave(self, watch: Watch) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, leave_cleanly)
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        watch.supervisor.spawn(ProcessRole.SERVER, wait_for_the_end)
        watch.run(messages=3)
        assert watch.supervisor.stop(ProcessRole.WORKER, PATIENCE_S) == 0
        assert sorted(code for _, code in watch.deaths) == [-signal.SIGTERM, 0]
        assert len(watch.supervisor.alive(ProcessRole.SERVER)) == 1

    def test_stop_kills_children_that_do_not_leave(self, watch: Watch) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, refuse_to_leave)
        watch.run(messages=1)
        assert watch.supervisor.stop(ProcessRole.WORKER, 0.3) == 1
        assert [code for _, code in watch.deaths] == [-signal.SIGKILL]

    def test_a_child_that_is_stopped_while_it_starts_does_not_miss_it(self, watch: Watch) -> None:
        for _ in range(5):
            watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        started_s = time.monotonic()
        watch.supervisor.stop(ProcessRole.WORKER, PATIENCE_S)
        assert time.monotonic() - started_s < PATIENCE_S / 2

    def test_a_signal_ends_the_run_and_leaves_the_children_to_stop(self, watch: Watch) -> None:
        watch.react = lambda _message: os.kill(os.getpid(), signal.SIGTERM)
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        assert watch.run() == 128 + signal.SIGTERM
        assert len(watch.supervisor.alive(ProcessRole.WORKER)) == 1

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_signals_are_given_back(self, number: signal.Signals) -> None:
        former = signal.getsignal(number)
        with closing_watch(restarts_max=0):
            assert signal.getsignal(number) != former
        assert signal.getsignal(number) is former

    def test_a_second_ctrl_c_does_not_wait(self, watch: Watch) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    def test_a_killed_fork_server_costs_restarts_not_the_run(self, watch: Watch) -> None:
        watch.supervisor.spawn(ProcessRole.WORKER, wait_for_the_end)
        watch.run(messages=1)
        os.kill(watch.messages[0]["parent"], signal.SIGKILL)
        assert watch.run(messages=2) == 0
        assert watch.messages[0]["parent"] != watch.messages[1]["parent"]


OWN_SUPERVISOR = """
import sys
from psa_store.cluster import ProcessRole
from psa_store.launch import Supervisor
from tests.integration import test_supervisor

it = Supervisor(
    preload=[], restarts_max=0, env={}, on_exit=lambda child: print("left", child.exit_code, flush=True),
    on_message=lambda message: print(message["parent"], message["pid"], flush=True),
)
for _ in range(2):
    it.spawn(ProcessRole.WORKER, getattr(test_supervisor, sys.argv[1]))
code = it.run(until=lambda: not it.alive(ProcessRole.WORKER))
print("stopped", code, it.stop(ProcessRole.WORKER, 20), flush=True)
it.close()
"""


def test_a_killed_supervisor_takes_its_children_along() -> None:
    with python(OWN_SUPERVISOR, "wait_for_the_end") as process:
        pids = {int(word) for _ in range(2) for word in read_line(process).split()}
        assert len(pids) == 3  # two children and the fork server
        with ends_within(GONE_S, *pids):
            process.kill()


def test_a_signal_to_the_whole_process_group_loses_no_exit_code() -> None:
    with python(OWN_SUPERVISOR, "leave_cleanly") as process:
        pids = {int(word) for _ in range(2) for word in read_line(process).split()}
        with ends_within(PATIENCE_S, *pids):
            os.killpg(process.pid, signal.SIGTERM)
            lines = [read_line(process) for _ in range(3)]
        assert lines == ["left 0", "left 0", f"stopped {128 + signal.SIGTERM} 0"]


def test_being_told_to_stop_again_and_again_does_not_interrupt_the_stopping() -> None:
    with python(OWN_SUPERVISOR, "leave_cleanly") as process:
        for _ in range(2):
            read_line(process)
        with ThreadPoolExecutor(1) as pool:
            output = pool.submit(process.communicate)
            while not wait([output], timeout=0.02).done:
                process.send_signal(signal.SIGTERM)
        assert output.result()[0].splitlines() == ["left 0", "left 0", f"stopped {128 + signal.SIGTERM} 0"]
