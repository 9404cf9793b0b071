"""The picture of the README: the loss of the GPT example while its processes are killed, five times. ::

    python -m tests.performance.loss_with_kills --data shakespeare.txt

Runs `psa run` with two workers and two servers on private servers of its own, kills at the steps of ``KILLS``, starts
the command again after it was killed itself, and draws the curve that the job keeps in Redis.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median

import redis

from psa_store.examples import gpt
from psa_store.observe import JobHistory
from psa_store.observe.curve import Point
from psa_store.observe.status import describe
from tests.performance.common import Servers, keep_up

KILLS = {300: "worker", 700: "server", 1050: "Redis", 1350: "worker", 1650: "psa run"}
JOB = "gpt"
_SMOOTH = 7
_STEP = re.compile(r"^step (\d+)/")
_LOSS = re.compile(r"^validation loss (\S+)")


def train(data: Path, servers: Servers) -> tuple[dict[int, str], str]:
    """Train to the end; return at which step what was killed, and the validation loss."""
    command = ["run", "--workers=2", "--servers=2", gpt.__file__, "--job", JOB, "--data", str(data), "--sample=0"]
    due, killed, loss = dict(KILLS), {}, ""
    while True:
        with servers.psa(*command) as run:
            assert run.stdout is not None
            for line in run.stdout:
                found = _STEP.match(line)
                if found and due and int(found[1]) >= min(due):
                    what = due.pop(min(due))
                    os.kill(_target(what, run.pid, servers), signal.SIGKILL)
                    killed[int(found[1])] = what
                    print(f"killed at step {found[1]}: {what}", flush=True)
                if found := _LOSS.match(line):
                    loss = found[1]
            code = run.wait()
        if code != -signal.SIGKILL:
            assert code == 0 and not due, (code, due)
            return killed, loss


def _target(what: str, run: int, servers: Servers) -> int:
    if what == "psa run":
        return run
    if what == "Redis":
        with redis.Redis.from_url(servers.redis) as client:
            return int(client.info("server")["process_id"])
    with closing(servers.store()) as store:
        status = describe(JOB, servers.settings, store)
    members = status.workers if what == "worker" else status.servers
    return next((each.pid for each in members if each.id == status.controller), members[0].pid)


def draw(points: Sequence[Point], killed: Mapping[int, str], loss: str, path: Path) -> None:
    """Loss over steps, and a line for each kill."""
    from matplotlib.figure import Figure

    losses = {each.version: float(each.loss) for each in points if each.loss is not None}
    steps = sorted(losses)
    half = _SMOOTH // 2
    smooth = [median(losses[step] for step in steps[max(0, i - half) : i + half + 1]) for i in range(len(steps))]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [losses[step] for step in steps], color="#b9c4d0", linewidth=0.8)
    axes.plot(steps, smooth, color="#222222", linewidth=1.5)
    top = max(losses.values())
    for step, what in killed.items():
        axes.axvline(step, color="#c0392b", linewidth=1.0)
        axes.text(step + 12, top, f"kill -9\n{what}", color="#c0392b", fontsize=9, va="top")
    axes.text(steps[-1], smooth[-1] + 0.35, f"validation loss {loss},\nas without kills", ha="right", fontsize=9)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss")
    axes.set_xlim(0, steps[-1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=100)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True, help="text to learn")
    options.add_argument("--out", type=Path, default=Path("loss-with-kills.png"))
    args = options.parse_args()
    with keep_up() as servers:
        killed, loss = train(args.data, servers)
        with closing(JobHistory(JOB, servers.redis, timeout_s=5)) as history:
            draw(history.curve(), killed, loss, args.out)


if __name__ == "__main__":
    main()
