"""A job that is resumed with another batch size goes on with the next sample; another data set is refused by name."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from psa_store.checkpoint.fork import fork
from psa_store.checkpoint.rollback import rollback
from psa_store.cli.transfer import export_files, import_files
from psa_store.cluster import ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity
from psa_store.job.config import JobConfig
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.position import Reading, begin
from psa_store.observe.metrics import Metrics
from psa_store.server.healing import Healing
from psa_store.server.work import Work
from psa_store.storage import RedisStore, keys
from tests.harness import Run, Site

SCRIPT = Path(__file__).with_name("reading.py")
MISMATCH = 2
Seen = dict[tuple[int, int], list[int]]


def start(site: Site, job: str, *extra: str, **options: object) -> Run:
    defaults: dict[str, object] = {"workers": 2, "servers": 1, "ranks": 2, "commit_every": 5}
    root = {"PYTHONPATH": str(Path(__file__).parents[2])}
    return site.run(job, *extra, script=SCRIPT, env=root, **{**defaults, **options})


def seen(*runs: Run) -> Seen:
    """By step and rank; a step that was made again must have the samples that it had."""
    found: Seen = {}
    for run in runs:
        for line in run.lines:
            if line.startswith("seen "):
                step, rank, *samples = map(int, line.split()[1:])
                assert found.setdefault((step, rank), samples) == samples, f"step {step} was another one again"
    return found


def train(site: Site, job: str, *extra: str, **options: object) -> Run:
    run = start(site, job, *extra, **options)
    assert run.finish() == 0, run.output
    return run


def times(samples: Seen, first: int = 0) -> Counter[int]:
    return Counter(each for (step, _), some in samples.items() for each in some if step >= first)


@pytest.mark.parametrize(
    "mode", ["sync", *(pytest.param(mode, marks=pytest.mark.long) for mode in ("local:steps=5", "async"))]
)
def test_another_batch_size_goes_on_with_the_next_sample(site: Site, mode: str) -> None:
    job = f"position-{mode.partition(':')[0]}"
    first = train(site, job, mode=mode)
    second = train(site, job, "--batch", "16", "--steps", "15")
    all_seen = seen(first, second)
    assert times(all_seen) == Counter(range(160)), "each sample once"
    third = train(site, job, "--batch", "4", "--steps", "25", "--processes", "1")
    assert len(times(seen(third))) == 40


def test_workers_that_train_go_over_to_a_batch_size_that_was_set(site: Site, tmp_path: Path) -> None:
    """In one step, all of them; and the job ends where it was told to, though one dies. The script says 8 and 40."""
    hold = ["--hold-at", "5", "--until", str(tmp_path / "go")]
    run = start(site, "position-set", *hold, "--steps", "40", "--pace-s", "0.1")
    run.wait_for_step(5)
    told = site.psa("job", "set", "position-set", "batch_size=24", "steps=10", "--yes")
    assert told.finish() == 0 and "from version 5 on batch_size=24 steps=10" in told.output, told.output
    victim = site.pids("position-set", "workers")[0]
    (tmp_path / "go").touch()
    run.wait_for_step(6)
    os.kill(victim, signal.SIGKILL)
    assert run.finish() == 0, run.output
    # What was in hand at step 5 was said, but made again.
    said = [list(map(int, line.split()[1:])) for line in run.lines if line.startswith("seen ")]
    last = {(step, rank): samples for step, rank, *samples in said}
    assert {step for step, _ in last} <= set(range(10))
    missing = {(step, rank) for step in range(10) for rank in range(2)} - last.keys()
    assert len(missing) <= 2, "a worker that was killed may not have said what it had done"
    assert max(times(last).values()) == 1
    assert len(times(last)) == 160 - 12 * len(missing), "steps 0 to 4 have 8 samples, the others 24"


def test_with_drop_last_a_pass_ends_where_no_step_fits(site: Site) -> None:
    first = train(site, "position-drop", "--samples", "50", "--drop-last", "--steps", "4")
    second = train(site, "position-drop", "--samples", "50", "--drop-last", "--batch", "12", "--steps", "6")
    samples = seen(first, second)
    one_pass = {key: each for key, each in samples.items() if key[0] < 5}
    assert max(times(one_pass).values()) == 1 and sum(times(one_pass).values()) == 44
    assert len(samples) == 12


def test_steps_that_are_made_again_read_as_they_did(site: Site) -> None:
    """Servers and workers die after the change; the job goes back to before it; forks and imports know of it."""
    train(site, "position-again", "--steps", "5")
    saved = site.psa("checkpoint", "save", "position-again", "--name", "early")
    assert saved.finish() == 0, saved.output
    first = train(site, "position-again")
    second = start(
        site, "position-again", "--batch", "16", "--steps", "40", "--pace-s", "0.02", commit_every=5, held=True
    )
    second.wait_for_step(13)
    for role in ("servers", "workers"):
        for pid in site.pids("position-again", role):
            os.kill(pid, signal.SIGKILL)
        second.wait_for_line(lambda line: "restarting" in line)
        if role == "servers":
            second.wait_for_line(lambda line: "serving" in line and "shards=1" in line)
    assert second.finish() == 0, second.output
    with RedisStore.from_settings(site.settings) as store:
        with Coordination.from_settings(site.settings, "position-again") as coordination:
            rollback(store, coordination, "position-again", "early")
        with Coordination.from_settings(site.settings, "position-fork") as coordination:
            fork(store, coordination, "position-again", "early", "position-fork")
    for job in ("position-again", "position-fork"):
        again = train(site, job, "--batch", "16", "--steps", "20")
        every = seen(first, second, again)  # a worker that was killed may not have said what it had done
        assert len(seen(again)) == 30
        assert len(times({key: each for key, each in every.items() if key[0] < 15})) == 120


def test_a_job_that_was_exported_keeps_its_position(site: Site, tmp_path: Path) -> None:
    first = train(site, "position-out")
    second = train(site, "position-out", "--batch", "16", "--steps", "12")
    export_files("position-out", None, str(tmp_path / "out"), site.settings)
    import_files(str(tmp_path / "out"), "position-in", site.settings, 4, None)
    third = train(site, "position-in", "--batch", "16", "--steps", "15", ranks=4)
    assert times(seen(first, second)) + times(seen(third)) == Counter(range(160))


def test_another_data_set_is_refused_or_begins_a_new_pass(site: Site) -> None:
    train(site, "position-data")
    for steps in ("10", "35"):  # also where none is left to do
        refused = start(site, "position-data", "--samples", "200", "--steps", steps)
        assert refused.finish() == MISMATCH, refused.output
        assert "data set of 160 samples, this process has 200" in refused.output
        assert "changed_data=True" in refused.output
    accepted = train(site, "position-data", "--samples", "200", "--steps", "35", "--changed-data")
    assert times(seen(accepted)) == Counter(range(200)), "one pass over the new data"
    train(site, "position-data", "--samples", "200", "--steps", "36")


def test_a_worker_with_another_batch_size_than_one_that_trains_is_refused(site: Site, tmp_path: Path) -> None:
    run = start(site, "position-two", "--hold-at", "5", "--until", str(tmp_path / "go"), workers=1, ranks=2)
    run.wait_for_step(5)
    other = site.psa("worker", str(SCRIPT), "--job", "position-two", "--batch", "16")
    assert other.finish() == MISMATCH, other.output
    assert "trains with batch_size=8 in worker" in other.output
    (tmp_path / "go").touch()
    assert run.finish() == 0, run.output
    assert len(times(seen(run))) == 80


def test_a_server_writes_the_record_again_that_redis_lost(site: Site) -> None:
    layout = make_layout([TensorSpec(("w",), (8,), "float32", TensorRole.TRAINED)])
    config = JobConfig("position-lost", 2, 0, {"name": "SGD"}, layout.fingerprint)
    record = begin(Reading(8, 160, 160)).changed(Reading(16, 160, 160), 10)
    with RedisStore.from_settings(site.settings) as store:
        store.check()
        store.create_job(config.name, config.to_json(), layout.to_json())
        stored = store.data_record(config.name)
        healing = Healing(store, config, layout, Metrics(ProcessRole.SERVER, "server-a"))
        work = Work(1, 0, {}, {})
        assert stored.replace("", record) and not stored.replace("", begin(Reading(1, 1, 1)))
        healing.heal(work, lambda lost: None)
        store.delete_job(config.name, 0)
        assert stored.read() == ("", None)
        healing.heal(work, lambda lost: None)
        assert stored.read()[1] == record and store.has_job(config.name)
        for garbage in (b"\xff\x00", b"", b"{", b"[]", b'{"format": 99}', b'{"format": 1, "stretches": 7}'):
            store._client.set(keys.data(config.name), garbage)
            if garbage:
                with pytest.raises(DataIntegrity, match=f"{config.name}.*is damaged"):
                    stored.read()
            store._client.set(keys.config(config.name), garbage)
            healing.heal(work, lambda lost: None)
            assert stored.read()[1] == record and store.documents(config.name).config() == config.to_json()


def test_the_heads_of_a_later_term_are_left_to_it(site: Site) -> None:
    layout = make_layout([TensorSpec(("w",), (8,), "float32", TensorRole.TRAINED)])
    config = JobConfig("position-later", 2, 0, {"name": "SGD"}, layout.fingerprint)
    with RedisStore.from_settings(site.settings) as store:
        store.check()
        store.create_job(config.name, config.to_json(), layout.to_json())
        healing = Healing(store, config, layout, Metrics(ProcessRole.SERVER, "server-a"))
        healing.committed_to(store.server_run_id())
        store.seal(config.name, [0], 8, layout.fingerprint)
        nothing: Any = {0: None}
        healing.heal(Work(7, 3, nothing, {}), lambda lost: pytest.fail("it writes"))
        assert store.heads(config.name, [0])[0].term == 8
