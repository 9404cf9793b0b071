"""`psa run`: everything of one job on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from psa_store.cli.options import SCRIPT, LogJson, Module, Script, begin, check_script
from psa_store.compression import parse_compression
from psa_store.config import with_flags
from psa_store.job.mode import parse_mode

app = typer.Typer()


@app.command(context_settings=SCRIPT)
def run(
    context: typer.Context,
    script: Script,
    module: Module = False,
    workers: Annotated[int, typer.Option(min=1, help="worker processes on this machine")] = 2,
    servers: Annotated[int, typer.Option(min=1, help="server processes on this machine")] = 1,
    ranks: Annotated[int | None, typer.Option(min=1, help="world size of a new job [default: --workers]")] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="restarts of dead processes before giving up")] = 100,
    commit_every: Annotated[int | None, typer.Option(min=0, help="steps between commits of a new job")] = None,
    mode: Annotated[
        str | None,
        typer.Option(help="new job: sync, async, ssp:staleness=N, or local:steps=H; see the README [default: sync]"),
    ] = None,
    compress: Annotated[
        str | None,
        typer.Option(help="new job: send gradients as bf16, fp16, int8, int4 or topk:0.01; bf16:both: parameters too"),
    ] = None,
    skip_nonfinite: Annotated[
        bool, typer.Option("--skip-nonfinite", help="new job: skip steps with NaN or Inf gradients")
    ] = False,
    checkpoint_every: Annotated[
        float | None, typer.Option(min=1.0, help="seconds between checkpoints; with it also one at the end")
    ] = None,
    checkpoint_files: Annotated[
        str | None, typer.Option(help="folder, or URL of fsspec, to which checkpoints go as well")
    ] = None,
    restore: Annotated[
        bool, typer.Option("--restore", help="if Redis has lost the job, go on from the newest of these files")
    ] = False,
    log_json: LogJson = False,
    label: Annotated[
        bool | None,
        typer.Option("--label/--no-label", help="begin each line with its process [default: if workers are several]"),
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="folder to keep what each process prints as well, a file for each")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="folder for TensorBoard: loss, learning rate, norm, speed, recoveries")
    ] = None,
) -> None:
    """Train: start workers and servers on this machine, watch them, restart what dies. Running it again resumes.

    Uses the Redis and ZooKeeper of PSA_REDIS and PSA_ZOOKEEPER (or of psa.toml, see `psa config show`); where these
    are unset, the ones of `psa up` or private ones that end with the run. Their data stay in PSA_HOME.

    Example: psa run --workers 2 --servers 1 train.py --steps 2000
    """
    from psa_store.launch.run import Run, run_job

    settings = with_flags(
        begin("run", log_json=log_json),
        ranks=ranks,
        commit_every=commit_every,
        mode=None if mode is None else str(parse_mode(mode)),
        compress=None if compress is None else str(parse_compression(compress)),
        skip_nonfinite=skip_nonfinite or None,
        checkpoint_every_s=checkpoint_every,
        checkpoint_files=checkpoint_files,
        restore=restore or None,
        tensorboard=tensorboard,
        log_dir=log_dir,
    )
    program = check_script(script, module)
    run = Run(program, tuple(context.args), workers, servers, max_restarts, workers > 1 if label is None else label)
    raise typer.Exit(run_job(run, settings))
