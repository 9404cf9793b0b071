"""The spawner starts processes fast, each with its own environment, and none outlives its harness."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from chaos.cluster.network import Network, namespaces_available
from chaos.cluster.spawner import Process, Spawner, SpawnerDied

_SOON_S = 120.0
_POLL_S = 0.01
_FOREVER = ["import time; print('here', flush=True); time.sleep(600)"]


@pytest.fixture(scope="module")
def spawner() -> Iterator[Spawner]:
    with Spawner({"COMMON": "to all"}) as spawner:
        yield spawner


def run(spawner: Spawner, log: Path, code: str, **env: str) -> Process:
    return spawner.spawn("child", "builtins:exec", [code], env, None, log)


def until(holds: Callable[[], bool]) -> None:
    end_s = time.monotonic() + _SOON_S
    while not holds():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(_POLL_S)


def until_it_says(log: Path, text: str) -> None:
    until(lambda: log.exists() and text in log.read_text())


def gone(pid: int) -> bool:
    """Orphans are for init to wait for."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_child_calls_the_function_with_its_arguments_and_environment(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    code = "import os, sys; print(os.environ['COMMON'], os.environ['OWN']); print('an error', file=sys.stderr)"
    assert run(spawner, log, code, OWN="to one").wait(_SOON_S) == 0
    assert sorted(log.read_text().splitlines()) == ["an error", "to all to one"]


def test_the_environment_and_log_of_one_child_are_not_those_of_the_next(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(spawner, log, "print('first')", OWN="x").wait(_SOON_S) == 0
    assert run(spawner, log, "import os; print('OWN' in os.environ)").wait(_SOON_S) == 0
    assert log.read_text() == "first\nFalse\n"


def test_everything_is_imported_and_spawning_is_fast(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    times = []
    for _ in range(5):
        began = time.monotonic()
        process = run(spawner, log, "import sys; assert {'torch', 'psa_store.worker'} <= set(sys.modules)")
        times.append(time.monotonic() - began)
        assert process.wait(_SOON_S) == 0, log.read_text()
    assert min(times) < 0.1


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("pass", 0),
        ("import sys; sys.exit(3)", 3),
        ("raise ValueError('bad')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
    ],
)
def test_exit_codes(spawner: Spawner, tmp_path: Path, code: str, expected: int) -> None:
    log = tmp_path / "log"
    process = run(spawner, log, code)
    assert process.wait(_SOON_S) == expected
    assert process.poll() == expected
    assert ("ValueError: bad" in log.read_text()) == (expected == 1)


def test_an_end_is_a_real_one(spawner: Spawner, tmp_path: Path) -> None:
    """Threads are joined and exit handlers run, as in a process that was executed."""
    log = tmp_path / "log"
    code = (
        "import atexit, threading; atexit.register(print, 'handler')\nthreading.Timer(0.2, print, ['thread']).start()"
    )
    assert run(spawner, log, code).wait(_SOON_S) == 0
    assert log.read_text() == "thread\nhandler\n"


def test_signals_reach_it(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = run(spawner, log, *_FOREVER)
    until_it_says(log, "here")
    assert process.poll() is None
    process.pause()
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_STOPPED)
    process.resume()
    until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING)
    with pytest.raises(TimeoutError, match="still runs"):
        process.wait(0.05)
    process.terminate()
    assert process.wait(_SOON_S) == -signal.SIGTERM
    for late in (process.kill, process.terminate, process.pause, process.resume):
        late()


def test_one_that_stands_still_can_be_killed(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = run(spawner, log, *_FOREVER)
    until_it_says(log, "here")
    process.pause()
    process.kill()
    assert process.wait(_SOON_S) == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)


def test_a_child_is_alone(spawner: Spawner, tmp_path: Path) -> None:
    """A session of its own, one thread, no descriptor of the spawner or of the children before it."""
    log = tmp_path / "log"
    older = run(spawner, tmp_path / "older", *_FOREVER)
    code = (
        "import json, os\nfds = [fd for fd in range(64) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "print(json.dumps([os.getsid(0) == os.getpid(), len(os.listdir('/proc/self/task')), fds]))"
    )
    assert run(spawner, log, code).wait(_SOON_S) == 0
    assert json.loads(log.read_text()) == [True, 1, [0, 1, 2]]
    older.kill()
    assert older.wait(_SOON_S) == -signal.SIGKILL


def test_neither_zombies_nor_descriptors_pile_up(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert run(spawner, log, "pass").wait(_SOON_S) == 0
    parent, harness = psutil.Process(spawner.pid), psutil.Process()
    before = parent.num_fds(), harness.num_fds()
    processes = [run(spawner, log, "pass") for _ in range(4)]
    for _ in range(4):
        run(spawner, log, "pass")  # dropped without waiting for its end
    for process in processes:
        assert process.wait(_SOON_S) == 0
    until(lambda: not parent.children())

    def as_before_after_one_more() -> bool:
        assert run(spawner, log, "pass").wait(_SOON_S) == 0
        return parent.num_fds() <= before[0] and harness.num_fds() <= before[1]

    until(as_before_after_one_more)


def test_an_order_that_cannot_be_followed_is_an_exit_code_and_a_line_in_the_log(
    spawner: Spawner, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert spawner.spawn("child", "no_such_module:main", [], {}, None, log).wait(_SOON_S) == 1
    assert spawner.spawn("child", "builtins:print", [], {}, "no-such-namespace", log).wait(_SOON_S) == 1
    assert "no_such_module" in log.read_text()
    assert "no-such-namespace" in log.read_text()
    assert run(spawner, log, "print('still serving')").wait(_SOON_S) == 0


def test_the_end_of_the_spawner_is_the_end_of_its_children(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Spawner({}) as spawner:
        process = run(spawner, log, *_FOREVER)
        until_it_says(log, "here")
        os.kill(spawner.pid, signal.SIGKILL)
        assert process.wait(_SOON_S) == -signal.SIGKILL
        until(lambda: gone(process.pid))
        with pytest.raises(SpawnerDied):
            run(spawner, log, "pass")


def test_leaving_the_context_ends_all_and_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "log"
    before = psutil.Process().num_fds()
    with Spawner({}) as spawner:
        process = run(spawner, log, *_FOREVER)
        until_it_says(log, "here")
        process.pause()
    assert process.poll() == -signal.SIGKILL
    assert not psutil.pid_exists(process.pid)
    assert not psutil.pid_exists(spawner.pid)
    assert psutil.Process().num_fds() == before


def test_the_end_of_the_harness_is_the_end_of_all(tmp_path: Path) -> None:
    log = tmp_path / "log"
    program = (
        "import sys\nfrom pathlib import Path\nfrom chaos.cluster.spawner import Spawner\n"
        "spawner = Spawner({}).__enter__()\n"
        f"child = spawner.spawn('child', 'builtins:exec', {_FOREVER!r}, {{}}, None, Path(sys.argv[1]))\n"
        "print(spawner.pid, child.pid, flush=True)\ninput()"
    )
    command = [sys.executable, "-c", program, str(log)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as harness:
        assert harness.stdout is not None
        pids = [int(word) for word in harness.stdout.readline().split()]
        assert len(pids) == 2
        harness.kill()
    until(lambda: all(map(gone, pids)))


@pytest.mark.skipif(namespaces_available() is not None, reason=namespaces_available() or "")
def test_a_child_lives_on_its_host(spawner: Spawner, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with Network(["one", "two"]) as network:
        for name in ("one", "two"):
            host = network.host(name)
            bind = f"import socket; print(socket.create_server(({host.address!r}, 80)).getsockname())"
            process = spawner.spawn(name, "builtins:exec", [bind], {}, host.namespace, log)
            assert process.wait(_SOON_S) == 0, log.read_text()
            assert str((host.address, 80)) in log.read_text()
