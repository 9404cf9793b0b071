"""`psa status` tells what a running job does, to people and to programs."""

from __future__ import annotations

import json
import os
import signal

from tests.harness import Run, Site


def test_a_running_job_is_described(site: Site) -> None:
    run = site.run("described", "--steps", "100000", "--pace-s", "0.01", workers=2, servers=2, commit_every=5)
    step = 12
    run.wait_for_step(step)
    while [server["shards"] > 0 for server in site.describe("described")["servers"]] != [True, True]:
        step += 5  # the second server joins by a hand-over, unless both were there from the start
        run.wait_for_step(step)
    asked = Run(["status", "described", "--json"], site.env)
    assert asked.finish() == 0, asked.output
    found = json.loads(asked.output)
    assert found["phase"] == "run" and found["ranks"] == 2 and found["committed"] % 5 == 0
    assert sum(server["shards"] for server in found["servers"]) == found["shards"]
    assert sorted(rank for worker in found["workers"] for rank in worker["ranks"]) == [0, 1]
    for server in found["servers"]:
        assert server["version"] >= 12 and 0 <= server["version"] - server["committed"] <= 10
    shown = Run(["status", "described"], site.env)
    assert shown.finish() == 0 and "controller" in shown.output and "running" in shown.output

    sleeper = next(server for server in found["servers"] if server["id"] != found["controller"])
    os.kill(sleeper["pid"], signal.SIGSTOP)
    try:
        sick = next(each for each in site.describe("described")["servers"] if each["id"] == sleeper["id"])
    finally:
        os.kill(sleeper["pid"], signal.SIGCONT)
    assert sick["version"] is None and "does not answer" in sick["sick"]
    run.process.send_signal(signal.SIGTERM)
    assert run.finish() == 0, run.output
    listed = Run(["status"], site.env)
    assert listed.finish() == 0 and "described" in listed.output and "at rest" in listed.output
