"""What the processes of `psa run` do: serve a job, or run the user's script as a worker of it."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from psa_store import logs
from psa_store.cluster import ProcessRole
from psa_store.config import load_settings
from psa_store.errors import PsaError


def worker_main(script: str, arguments: Sequence[str]) -> None:
    """In a worker process: run the user's script."""
    _run_as(ProcessRole.WORKER, lambda: run_script(script, arguments))


def server_main(job: str) -> None:
    """In a server process: serve the job."""
    from psa_store.server import serve

    _run_as(ProcessRole.SERVER, lambda: serve(job, load_settings()))


def run_script(script: str, arguments: Sequence[str]) -> None:
    """Run a script as ``python script arguments…`` would."""
    sys.argv = [script, *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    runpy.run_path(script, run_name="__main__")


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
