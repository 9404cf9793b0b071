"""The picture of the README: the loss of the GPT example while what trains it is killed, five times. ::

    python -m tests.performance.loss_with_kills --data shakespeare.txt

Runs `psa run` with two workers and two servers on private servers of its own, kills at the steps of ``KILLS``, starts
the command again after it was killed itself, and draws the curve that the job keeps in Redis.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import redis

from psa_store.config import Settings
from psa_store.examples import gpt
from psa_store.launch import Addresses, down, up
from psa_store.observe.status import describe
from psa_store.storage import History, RedisStore

KILLS = {300: "worker", 700: "server", 1050: "Redis", 1350: "worker", 1650: "psa run"}
JOB = "gpt"
_SMOOTH = 7
_STEP = re.compile(r"^step (\d+)/")
_LOSS = re.compile(r"^validation loss (\S+)")


def train(data: Path, addresses: Addresses) -> tuple[dict[int, str], str]:
    """Train to the end; returns at which step what was killed, and the validation loss."""
    command = [sys.executable, "-m", "psa_store.cli", "run", "--workers", "2", "--servers", "2"]
    command += [str(Path(gpt.__file__)), "--job", JOB, "--data", str(data), "--sample", "0"]
    env = {**os.environ, "PSA_REDIS": addresses.redis, "PSA_ZOOKEEPER": addresses.zookeeper}
    due, killed, loss = dict(KILLS), {}, ""
    while True:
        with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as run:
            assert run.stdout is not None
            for line in run.stdout:
                found = _STEP.match(line)
                if found and due and int(found[1]) >= min(due):
                    what = due.pop(min(due))
                    os.kill(_victim(what, run.pid, addresses), signal.SIGKILL)
                    killed[int(found[1])] = what
                    print(f"killed at step {found[1]}: {what}", flush=True)
                if found := _LOSS.match(line):
                    loss = found[1]
        if run.returncode != -signal.SIGKILL:
            assert run.returncode == 0 and not due, (run.returncode, due)
            return killed, loss


def _victim(what: str, run: int, addresses: Addresses) -> int:
    if what == "psa run":
        return run
    if what == "Redis":
        with redis.Redis.from_url(addresses.redis) as client:
            return int(client.info("server")["process_id"])
    with closing(RedisStore(addresses.redis, timeout_s=5)) as store:
        status: dict[str, Any] = describe(JOB, Settings(redis=addresses.redis, zookeeper=addresses.zookeeper), store)
    members = status[f"{what}s"]
    return int(next((each for each in members if each["id"] == status["controller"]), members[0])["pid"])


def draw(points: Sequence[Mapping[str, Any]], killed: Mapping[int, str], loss: str, path: Path) -> None:
    """Loss over steps, and a line for each kill."""
    from matplotlib.figure import Figure

    told = {int(each["version"]): float(each["loss"]) for each in points if each.get("loss") is not None}
    steps = sorted(told)
    half = _SMOOTH // 2
    smooth = [median(told[step] for step in steps[max(0, i - half) : i + half + 1]) for i in range(len(steps))]
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [told[step] for step in steps], color="#b9c4d0", linewidth=0.8)
    axes.plot(steps, smooth, color="#222222", linewidth=1.5)
    top = max(told.values())
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
    with tempfile.TemporaryDirectory() as folder:
        addresses = up(Path(folder), 1)
        try:
            killed, loss = train(args.data, addresses)
            with closing(History(addresses.redis, timeout_s=5)) as history:
                draw(history.curve(JOB), killed, loss, args.out)
        finally:
            down(Path(folder))


if __name__ == "__main__":
    main()
