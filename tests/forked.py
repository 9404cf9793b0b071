"""The `psa` command in a process that was forked from one that has imported everything, for tests that start hundreds.

An executed one imports torch for two seconds of a processor before anything happens. What follows is the product's own
code, but for the start of the fork server of `psa run`: it is forked here, and executed there.
"""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import ModuleType

_KNOWN = {"PYTHONFAULTHANDLER", "PYTHONHASHSEED", "PYTHONPATH"}
HASH_SEED = {"PYTHONHASHSEED": "0"}
"""For the spawner: what `psa run` sets for its fork server, and what can not be set any more in a process that runs."""

_FORK_SERVER = "multiprocessing.forkserver"
_EXECUTE = multiprocessing.util.spawnv_passfds  # type: ignore[attr-defined]


def can_fork(env: Mapping[str, str]) -> bool:
    """Whether no variable asks something of the interpreter itself that the spawner was not started with."""
    changed = {name for name, value in env.items() if name.startswith("PYTHON") and os.environ.get(name) != value}
    return changed <= _KNOWN and env.get("PYTHONHASHSEED", "0") == "0"


def psa(arguments: Sequence[str], env: Mapping[str, str], folder: str, errors: str | None = None) -> None:
    """Do what ``python -m psa_store.cli`` does in ``folder``, with this environment. The target of a spawner.

    ``errors``: a file for what it prints to standard error.
    """
    if errors is not None:
        fd = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, 2)
        os.close(fd)
    os.environ.clear()
    os.environ.update({**HASH_SEED, **env})
    os.chdir(folder)
    sys.argv = ["psa", *arguments]
    sys.path[:0] = env.get("PYTHONPATH", "").split(os.pathsep) if env.get("PYTHONPATH") else []
    if "PYTHONFAULTHANDLER" in env:
        faulthandler.enable()
    _be_main("psa_store.cli.__main__")
    multiprocessing.util.spawnv_passfds = _fork_for  # type: ignore[attr-defined]
    importlib.import_module("psa_store.cli.app").main()


def _be_main(name: str) -> None:
    """What processes of multiprocessing would look up, to have the same main program as we."""
    main = ModuleType("__main__")
    main.__spec__ = importlib.util.find_spec(name)
    sys.modules["__main__"] = main


def _fork_for(path: bytes | str, args: Sequence[bytes | str], passed: Sequence[int]) -> int:
    """Fork the fork server, which is then where an executed one is after its imports; in place of spawnv_passfds()."""
    code = os.fsdecode(args[-1])
    if _FORK_SERVER not in code:
        return _EXECUTE(path, args, passed)  # type: ignore[no-any-return]
    if (pid := os.fork()) > 0:
        return pid
    try:
        # As execve() does: what the command has caught is caught no more, and only what is passed stays open.
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(-1)
        opened = {int(each) for each in os.listdir("/proc/self/fd")}
        for fd in opened - {0, 1, 2} - {int(each) for each in passed}:
            with suppress(OSError):
                os.close(fd)
        multiprocessing.util.spawnv_passfds = _EXECUTE  # type: ignore[attr-defined]
        multiprocessing.forkserver._forkserver.__init__()  # type: ignore[misc]
        multiprocessing.resource_tracker._resource_tracker.__init__()  # type: ignore[misc]
        exec(code, {"__name__": "__main__"})
        os._exit(0)
    except SystemExit:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
