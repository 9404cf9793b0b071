"""The main job three times: undisturbed, with one worker, and with a worker and a server killed. ::

    python -m tests.performance.main_job --data shakespeare.txt

Prints validation loss and sha256 of the final parameters and optimizer state of each; the three must be equal.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
from contextlib import closing
from pathlib import Path

from psa_store.checkpoint.reader import open_version
from psa_store.examples import gpt
from psa_store.observe.status import describe
from tests.performance.common import Servers, private_servers

RANKS = 2
_STEP = re.compile(r"^step (\d+)/")
_LOSS = re.compile(r"^validation loss \S+")


def train(name: str, workers: int, kills: dict[int, str], args: argparse.Namespace, servers: Servers) -> str:
    """Run the main job once; ``kills``: after which step to kill one of the "workers" or "servers"."""
    command = ["run", f"--workers={workers}", "--servers=1", f"--ranks={RANKS}", gpt.__file__, "--job", name]
    command += ["--steps", str(args.steps), "--sample=0", *(["--data", str(args.data)] if args.data else [])]
    loss, due = "no loss", dict(kills)
    with closing(servers.store()) as store:
        for line in servers.psa_lines(*command):
            if found := _STEP.match(line):
                for step in [step for step in due if int(found[1]) >= step]:
                    kind = due.pop(step)
                    pid = getattr(describe(name, servers.settings, store), kind)[0].pid
                    os.kill(pid, signal.SIGKILL)
                    print(f"  {name}: killed one of the {kind}, pid {pid}, at step {found[1]}", flush=True)
            if found := _LOSS.match(line):
                loss = found[0]
        if due:
            raise SystemExit(f"{name} ended before these kills: {due}")
        digest = open_version(store, name, args.steps).digest()
    print(f"{name:12} {loss}   sha256 {digest}", flush=True)
    return digest


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path)
    options.add_argument("--steps", type=int, default=2000)
    options.add_argument("--seed", type=int, default=0)
    args = options.parse_args()
    rng = random.Random(args.seed)
    first, second = sorted(rng.sample(range(args.steps // 10, args.steps * 9 // 10), 2))
    with private_servers() as servers:
        digests = {
            train("undisturbed", 2, {}, args, servers),
            train("killed", 2, {first: "workers", second: "servers"}, args, servers),
            train("one-worker", 1, {}, args, servers),
        }
    print("all equal" if len(digests) == 1 else "DIFFERENT")
    sys.exit(len(digests) - 1)


if __name__ == "__main__":
    main()
