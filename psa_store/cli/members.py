"""`psa server` and `psa worker`: one more process of a job, on any machine."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from psa_store import logs
from psa_store.cli.options import SCRIPT, LogJson, Module, Script, begin, check_script
from psa_store.config import as_environment

app = typer.Typer()
_HASH_SEED = "PYTHONHASHSEED"


@app.command()
def server(job: Annotated[str, typer.Option(help="name of the job to serve")], log_json: LogJson = False) -> None:
    """Serve shards of a job until SIGTERM; then hand them over and exit. May join and leave at any time.

    Example: PSA_REDIS=redis://db:6379 PSA_ZOOKEEPER=zk1:2181,zk2:2181 PSA_BIND=10.0.0.7 psa server --job demo
    """
    from psa_store.server import serve

    settings = begin("server", log_json=log_json)
    logs.entitle("server")
    serve(job, settings)


@app.command(context_settings=SCRIPT)
def worker(context: typer.Context, script: Script, module: Module = False, log_json: LogJson = False) -> None:
    """Run a training script as one more worker of its job. May join and leave at any time.

    Example: PSA_REDIS=redis://db:6379 PSA_ZOOKEEPER=zk1:2181,zk2:2181 psa worker train.py --steps 2000
    """
    settings = begin("worker", log_json=log_json)
    program = check_script(script, module)
    if _HASH_SEED not in os.environ:  # read when Python starts: sets of strings have one order in all workers
        os.environ[_HASH_SEED] = "0"
        os.execv(sys.executable, sys.orig_argv)
    # The script reads the settings again, maybe in another directory.
    os.environ.update(as_environment(settings))
    logs.entitle("worker")
    program.run(context.args)
