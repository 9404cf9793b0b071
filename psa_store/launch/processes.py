"""What the processes of `psa run` do: serve a job, or run the user's script as a worker of it."""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from psa_store import logs
from psa_store.cluster import ProcessRole
from psa_store.config import load_settings
from psa_store.errors import PsaError, UsageError

_SEED = 0


@dataclass(frozen=True, slots=True)
class Program:
    """What workers run: a script, or a module as `python -m` does."""

    name: str
    is_module: bool = False

    def run(self, arguments: Sequence[str]) -> None:
        """Run it as the main program of this process.

        Generators of random numbers begin alike in all workers and after a resume, for what it does before its first
        step: build a model, split a data set.
        """
        # Before the script's folder is searched, where a file may have the name of something that we need.
        import psa_store.launch.preload  # noqa: F401  # torch: not in the supervisor
        from psa_store.worker.randomness import seed_all

        seed_all(_SEED)
        if self.is_module:
            sys.path.insert(0, os.getcwd())
            if not _exists(self.name):
                raise UsageError(f"no module {self.name} in {os.getcwd()}, nor in what is installed")
            sys.argv = [self.name, *arguments]
            runpy.run_module(self.name, run_name="__main__", alter_sys=True)
        else:
            sys.argv = [self.name, *arguments]
            sys.path.insert(0, str(Path(self.name).resolve().parent))
            runpy.run_path(self.name, run_name="__main__")


def worker_main(script: str, arguments: Sequence[str]) -> None:
    """In a worker process: run the user's script."""
    _run_as(ProcessRole.WORKER, lambda: Program(script).run(arguments))


def module_main(module: str, arguments: Sequence[str]) -> None:
    """In a worker process: run the user's module."""
    _run_as(ProcessRole.WORKER, lambda: Program(module, is_module=True).run(arguments))


def server_main(job: str) -> None:
    """In a server process: serve the job."""
    from psa_store.server import serve

    _run_as(ProcessRole.SERVER, lambda: serve(job, load_settings()))


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError as error:
        if error.name is None or not module.startswith(error.name):
            raise  # its package misses another module, and says so
        return False


def _run_as(role: ProcessRole, work: Callable[[], None]) -> None:
    """Run the work of a child process; our errors end it with their code, others with a traceback and 1."""
    settings = load_settings()
    logs.configure(settings.log_level, role, as_json=settings.log_json)
    try:
        work()
    except PsaError as error:
        logs.complain(f"{role}: {error}")
        sys.exit(error.exit_code)
    except Exception:
        logs.complain(f"{role}: user code failed", with_traceback=True)
        sys.exit(1)
