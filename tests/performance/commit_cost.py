"""What commits cost, within one run: ``python -m tests.performance.commit_cost --data shakespeare.txt``.

Trains the GPT example with two workers and one server at the default commit interval and times every step. A commit
begins with the step after a multiple of ``commit_every`` and is written while the next steps run; so the steps of the
first half of each interval, which pay for it, are compared with those of the second half of the same interval, which
do not. Both halves are of one run, so a machine that drifts between two runs does not hide small costs.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import psa_store as psa
from psa_store.examples import gpt
from psa_store.job.config import COMMIT_EVERY_DEFAULT
from tests.performance.common import private_servers

WARM_UP_INTERVALS = 1
AIM = 0.035


def train(data: str, steps: int) -> None:
    """The training script: prints the seconds of each step from the main worker."""
    torch.set_num_threads(1)
    options = gpt.parse_options(["--steps", str(steps), *(["--data", data] if data else [])])
    text = gpt.load_text(options.data)
    vocabulary = gpt.Vocabulary.of(text)
    training, _ = gpt.split(vocabulary.encode(text), options.block)
    model = gpt.build_model(options, vocabulary)
    with psa.Worker("cost", model, optimizer=gpt.build_optimizer(options), steps=steps) as worker:
        before_s = time.perf_counter()
        for batch in worker.batches(training, batch_size=options.batch_size):
            model.loss(batch).backward()  # type: ignore[no-untyped-call]
            worker.step()
            now_s = time.perf_counter()
            if worker.is_main:
                print(f"took {worker.version} {now_s - before_s}", flush=True)
            before_s = now_s


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", default="")
    options.add_argument("--steps", type=int, default=1500)
    options.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = options.parse_args()
    if args.train:
        return train(args.data, args.steps)
    script = [__file__, "--train", "--data", args.data, "--steps", str(args.steps)]
    with private_servers() as servers:
        lines = [line.split() for line in servers.psa_lines("run", "--workers=2", "--servers=1", *script)]
    took = {int(line[1]): float(line[2]) for line in lines if line[:1] == ["took"]}
    every, half = COMMIT_EVERY_DEFAULT, COMMIT_EVERY_DEFAULT // 2
    costs = []
    for start in range(WARM_UP_INTERVALS * every, args.steps - every + 1, every):
        # The version at a multiple of `every` is copied and written while the steps after it are computed.
        paying = [took[version] for version in range(start + 1, start + half + 1)]
        free = [took[version] for version in range(start + half + 1, start + every + 1)]
        costs.append((sum(paying) - sum(free)) / (2 * sum(free)))
    spread = statistics.quantiles(costs, n=4)
    print(
        f"normal step {statistics.median(took.values()) * 1e3:.1f} ms; a commit every {every} steps costs "
        f"{statistics.median(costs):+.1%} (median of {len(costs)} intervals, quartiles {spread[0]:+.1%} to "
        f"{spread[2]:+.1%}; aim: at most {AIM:.1%})"
    )
    return None


if __name__ == "__main__":
    main()
