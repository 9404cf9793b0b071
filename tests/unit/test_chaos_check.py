"""The checker: a healthy run passes; each broken promise in a history is found by its check and by no other."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from chaos.check import check_history
from chaos.check.recovery import Steps, goodput, recoveries, steps_of
from chaos.history import Event, History, Reference, read_history, reference_of
from chaos.report import Run, write_report
from psa_store.errors import DataIntegrity
from psa_store.job.mode import parse_mode

STEPS, RANKS, COMMIT_EVERY = 40, 2, 10
STEP_S = 0.01
SHARDS = {"s0": [0, 1], "s1": [2]}
CUT = {0: 0, 1: 1, 2: 1}
"""By shard, its stage in a model of two."""


def share(server: str, step: int, rank: int, stage: int) -> int:
    """The fingerprint of a cell's gradient, in its shards of one server."""
    return 1000 * step + 100 * rank + 10 * stage + len(SHARDS[server])


class HistoryBuilder:
    """The history of a run as its processes would record it; tests change it before it is checked."""

    def __init__(self, stages: int = 1) -> None:
        self.events: list[Event] = []
        self.t = 0.0
        self.cells = list(itertools.product(range(RANKS), range(stages)))
        self.stage_of = CUT if stages > 1 else dict.fromkeys(CUT, 0)
        facts = {"name": "kill-server", "seed": 0, "steps": STEPS, "ranks": RANKS, "commit_every": COMMIT_EVERY}
        how = {"mode": "sync", "stages": stages, "loses_redis": False, "session_timeout_s": 4.0}
        self.record("harness", "0", "scenario", **facts, **how, replay="psa …")

    def shards_of(self, server: str, stage: int) -> int:
        """How many shards of a stage a server has."""
        return sum(self.stage_of[shard] == stage for shard in SHARDS[server])

    def record(self, role: str, name: str, event: str, /, **fields: Any) -> None:
        self.t += 1e-6
        self.events.append(Event(self.t, event, role, name, 1, fields))

    def term(self, number: int, resume: int, until: int) -> None:
        """A term that makes the versions after ``resume`` up to ``until``."""
        self.record("server", "s0", "published", term=number, resume=resume, servers=list(SHARDS))
        for server, shards in SHARDS.items():
            trained = {str(stage): self.shards_of(server, stage) for stage in set(self.stage_of.values())}
            facts = {"term": number, "resume": resume, "shards": shards, "versioned": len(shards), "trained": trained}
            facts["clocks"] = {}
            self.record("server", server, "serving", **facts)
            for shard in shards:
                manifests = [[version, number, f"n{number}-{version}"] for version in (resume,)]
                self.record("reader", "0", "head", shard=shard, term=number, manifests=manifests)
        for step in range(resume, until):
            self.step(number, step)

    def step(self, term: int, step: int) -> None:
        self.t += STEP_S
        for rank, stage in self.cells:
            total = sum(share(server, step, rank, stage) for server in SHARDS if self.shards_of(server, stage))
            where = {"term": term, "step": step, "rank": rank, "stage": stage}
            self.record("train", f"t{rank}", "batch", term=term, version=step, rank=rank, digest=f"d{step}")
            self.record("worker", f"w{rank}", "computing", **where)
            self.record("worker", f"w{rank}", "pushed", **where, sum=f"{total:016x}")
        for server in SHARDS:
            cells = [(rank, stage) for rank, stage in self.cells if self.shards_of(server, stage)]
            counts = {f"{rank}.{stage}": self.shards_of(server, stage) for rank, stage in cells}
            sums = {f"{rank}.{stage}": f"{share(server, step, rank, stage):016x}" for rank, stage in cells}
            self.record("server", server, "applied", term=term, version=step + 1, shards=counts, sums=sums)
        for rank in range(RANKS):
            self.record("worker", f"w{rank}", "acked", term=term, version=step + 1)
        if (step + 1) % COMMIT_EVERY == 0:
            for server in SHARDS:
                nonces = {str(shard): f"n{term}-{step + 1}" for shard in SHARDS[server]}
                self.record("server", server, "committed", term=term, version=step + 1, nonces=nonces)

    def fault(self, kind: str = "kill-server", pause_s: float = 0.5) -> None:
        self.record("harness", "0", "fault", id=0, kind=kind, for_s=0.0)
        self.record("harness", "0", "fired", id=0, evidence="SIGKILL")
        self.record("harness", "0", "healed", id=0)
        self.record("harness", "0", "quiet")
        self.t += pause_s

    def end(self) -> None:
        self.record("reader", "0", "read", version=30, digest="d30")
        self.record("harness", "0", "reader", exit_code=0)
        self.record("server", "s0", "durable", term=9, version=STEPS)
        self.record("worker", "w0", "finished", version=STEPS)
        self.record("harness", "0", "final", version=STEPS, digest="F")
        self.record("harness", "0", "end", exit_code=0, wall_s=self.t)

    def change(self, event: str, which: int = 0, /, **fields: Any) -> None:
        """Falsify what was written down."""
        at = [index for index, each in enumerate(self.events) if each.event == event][which]
        old = self.events[at]
        self.events[at] = Event(old.t, event, old.role, old.name, old.pid, {**old.fields, **fields})

    def drop(self, event: str, which: int = 0) -> None:
        at = [index for index, each in enumerate(self.events) if each.event == event][which]
        del self.events[at]

    def broken(self) -> set[str]:
        return {violation.check for violation in check_history(History(self.events), REFERENCE).violations}


REFERENCE = Reference({(version, None): f"d{version}" for version in range(STEPS)}, "F")


@pytest.fixture
def builder() -> HistoryBuilder:
    """A server dies after version 27; the next term goes back to 20."""
    return with_a_rollback(HistoryBuilder())


@pytest.fixture
def staged() -> HistoryBuilder:
    """The same of a model in two stages; the second server has shards of the last one only."""
    return with_a_rollback(HistoryBuilder(stages=2))


def with_a_rollback(builder: HistoryBuilder) -> HistoryBuilder:
    builder.term(1, 0, 27)
    builder.fault()
    builder.term(2, 20, STEPS)
    builder.end()
    return builder


def test_a_healthy_run_with_a_rollback_keeps_all_promises(builder: HistoryBuilder) -> None:
    assert builder.broken() == set()


def test_a_gradient_that_counts_twice_is_seen(builder: HistoryBuilder) -> None:
    builder.change("applied", -1, sums={"0.0": "1", "1.0": "2"})
    assert builder.broken() == {"exactly_once"}


def test_a_rank_that_is_missing_in_a_shard_is_seen(builder: HistoryBuilder) -> None:
    builder.change("applied", -2, shards={"0.0": 2, "1.0": 1})
    assert builder.broken() == {"exactly_once"}


def test_a_version_that_one_server_never_applied_is_seen(builder: HistoryBuilder) -> None:
    builder.drop("applied", -1)
    assert builder.broken() == {"exactly_once"}


def test_a_version_that_a_server_applied_twice_is_seen(builder: HistoryBuilder) -> None:
    builder.events.append(builder.events[[e.event for e in builder.events].index("applied")])
    assert builder.broken() == {"exactly_once"}


def test_what_was_applied_in_a_term_that_was_rolled_back_may_be_anything(builder: HistoryBuilder) -> None:
    lost = [i for i, each in enumerate(e for e in builder.events if e.event == "applied") if each["version"] == 25]
    builder.change("applied", lost[0], sums={"0.0": "1", "1.0": "2"})
    assert builder.broken() == set()


def test_an_acknowledgement_before_the_update_is_seen(builder: HistoryBuilder) -> None:
    early = Event(0.001, "acked", "worker", "w0", 1, {"term": 1, "version": 27})
    builder.events.append(early)
    assert builder.broken() == {"exactly_once"}


def test_a_server_whose_shards_never_change_is_not_waited_for(builder: HistoryBuilder) -> None:
    """Found by stages-unsupervised-kill-worker, seed 1, in this check."""
    facts = {"term": 2, "resume": 20, "shards": [3], "versioned": 0, "trained": {}}
    builder.events.append(Event(0.1, "serving", "server", "s2", 1, facts))
    told = {event["version"]: event.t for event in builder.events if event.event == "acked" and event["term"] == 2}
    for version, t in told.items():
        facts = {"term": 2, "version": version, "shards": {}, "sums": {}}
        builder.events.append(Event(t + 1e-3, "applied", "server", "s2", 1, facts))
    assert builder.broken() == set()


def test_ranks_that_compute_differently_are_seen(builder: HistoryBuilder) -> None:
    builder.record("worker", "w9", "pushed", term=1, step=3, rank=0, stage=0, sum="0" * 16)
    assert builder.broken() == {"exactly_once"}


def test_a_healthy_run_in_stages_keeps_all_promises(staged: HistoryBuilder) -> None:
    assert staged.broken() == set()


def applied_last(builder: HistoryBuilder, server: int, **changed: dict[str, Any]) -> None:
    """Falsify, cell by cell, what a server says of the last version."""
    events = [event for event in builder.events if event.event == "applied"][-2:]
    builder.change("applied", server - 2, **{name: {**events[server][name], **of} for name, of in changed.items()})


LAST = STEPS - 1


@pytest.mark.parametrize(
    ("what", "falsified"),
    [
        ("the push of a cell was lost", {"shards": {"1.1": 0}, "sums": {"1.1": "0"}}),
        ("the push of a cell was lost in one shard", {"shards": {"1.0": 0}}),
        ("the push of a cell counts twice", {"sums": {"1.1": f"{2 * share('s0', LAST, 1, 1):016x}"}}),
        ("the push of a cell is of another version", {"sums": {"1.1": f"{share('s0', LAST - 1, 1, 1):016x}"}}),
        (
            "the pushes of two cells of a rank were exchanged: their sum is right",
            {"sums": {"1.0": f"{share('s0', LAST, 1, 1):016x}", "1.1": f"{share('s0', LAST, 1, 0):016x}"}},
        ),
    ],
)
def test_a_push_of_a_cell_that_is_not_there_once_is_seen(
    staged: HistoryBuilder, what: str, falsified: dict[str, dict[str, Any]]
) -> None:
    applied_last(staged, 0, **falsified)
    assert staged.broken() == {"exactly_once"}, what


def test_a_cell_that_is_computed_with_another_result_is_seen(staged: HistoryBuilder) -> None:
    of_the_other_stage = f"{sum(share(server, 3, 0, 1) for server in SHARDS):016x}"
    staged.record("worker", "w9", "pushed", term=1, step=3, rank=0, stage=0, sum=of_the_other_stage)
    assert staged.broken() == {"exactly_once"}


def test_a_cell_that_no_worker_computed_is_seen(staged: HistoryBuilder) -> None:
    cell = {"step": 25, "rank": 0, "stage": 1}
    staged.events = [e for e in staged.events if e.event != "computing" or not cell.items() <= e.fields.items()]
    assert staged.broken() == {"exactly_once"}


def test_a_stage_with_parameters_of_another_version_is_seen(staged: HistoryBuilder) -> None:
    for digest in ("stage 1 at version 20", "stage 1 at version 19"):
        staged.record("train", "t0", "batch", term=2, version=20, rank=0, stage=1, digest=digest)
    assert staged.broken() == {"bits"}


@pytest.mark.parametrize(("event", "fields"), [("final", {"digest": "G"}), ("end", {"exit_code": 1})])
def test_another_result_is_seen(builder: HistoryBuilder, event: str, fields: dict[str, Any]) -> None:
    builder.change(event, -1, **fields)
    assert builder.broken() == {"bits"}


def test_where_pushes_are_applied_on_arrival_each_counts_once_and_bits_are_luck(builder: HistoryBuilder) -> None:
    builder.change("scenario", mode="async")
    builder.change("final", digest="G")
    builder.change("serving", 2, clocks={"0": [0, 0]})
    builder.record("server", "s0", "updated", term=2, shard=0, rank=1, step=0)
    assert builder.broken() == set()
    builder.record("server", "s0", "updated", term=2, shard=0, rank=1, step=0)
    assert builder.broken() == {"arrival"}
    builder.change("end", exit_code=1)
    assert builder.broken() == {"arrival", "bits"}


def test_what_ranks_see_between_rounds_is_no_version(builder: HistoryBuilder) -> None:
    undisturbed = History(builder.events)
    assert (
        reference_of(undisturbed, "F").digests
        and not reference_of(undisturbed, "F", parse_mode("local:steps=4")).digests
    )
    builder.change("scenario", mode="local:steps=4")
    builder.record("train", "t0", "batch", term=2, version=20, rank=0, digest="of its own")
    assert builder.broken() == set()
    builder.record("reader", "0", "read", version=20, digest="mixed")
    assert builder.broken() == {"bits"}


@pytest.mark.parametrize("event", ["read", "reader"])
def test_a_reader_that_did_not_look_is_seen(builder: HistoryBuilder, event: str) -> None:
    builder.drop(event)
    assert builder.broken() == {"observed"}


def test_a_reader_that_never_saw_a_head_is_seen(builder: HistoryBuilder) -> None:
    builder.events = [event for event in builder.events if event.event != "head"]
    assert builder.broken() == {"observed"}


@pytest.mark.parametrize(("loses", "broken"), [(False, {"observed"}), (True, set())])
def test_a_damaged_value_that_the_reader_met_is_seen(builder: HistoryBuilder, loses: bool, broken: set[str]) -> None:
    builder.change("scenario", loses_redis=loses)
    builder.record("reader", "0", "failed", error="DataIntegrity: job 'x', shard 1: its digest does not match")
    assert builder.broken() == broken


def test_a_term_that_begins_before_the_one_before_it_is_seen() -> None:
    """A term that resumed at 20 has read it from every shard, even if no server lived to record the commit."""
    builder = HistoryBuilder()
    builder.term(1, 0, 27)
    builder.events = [event for event in builder.events if event.event != "committed"]
    builder.term(2, 20, 27)
    builder.fault()
    builder.term(3, 10, STEPS)
    builder.end()
    assert builder.broken() == {"durability"}


@pytest.mark.parametrize("role", ["train", "reader"])
def test_a_mixture_that_was_read_is_found(builder: HistoryBuilder, role: str) -> None:
    builder.record(role, "0", "batch" if role == "train" else "read", version=20, digest="mixed")
    assert builder.broken() == {"bits"}


def test_what_the_harness_could_not_do_is_no_success(builder: HistoryBuilder) -> None:
    builder.record("harness", "0", "broken", why="OutOfTime: it hangs")
    assert builder.broken() == {"bits"}


def test_a_commit_of_an_old_term_after_a_seal_is_seen(builder: HistoryBuilder) -> None:
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[27, 1, "late"]])
    assert builder.broken() == {"fencing"}


def test_what_was_there_before_the_seal_may_stay(builder: HistoryBuilder) -> None:
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[0, 1, "n1-0"]])
    assert builder.broken() == set()


def test_a_head_without_a_term_is_none_of_ours(builder: HistoryBuilder) -> None:
    builder.record("reader", "0", "head", shard=0, term=0, manifests=[])
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[0, 1, "n1-0"]])
    assert builder.broken() == set()
    builder.record("reader", "0", "head", shard=0, term=1, manifests=[])
    assert builder.broken() == {"fencing"}


def test_a_head_whose_term_falls_is_seen(builder: HistoryBuilder) -> None:
    builder.record("reader", "0", "head", shard=0, term=1, manifests=[])
    assert builder.broken() == {"fencing"}


def test_a_process_that_goes_back_to_an_old_term_is_seen(builder: HistoryBuilder) -> None:
    builder.record("worker", "w0", "loaded", term=2, version=20)
    builder.record("worker", "w0", "loaded", term=1, version=20)
    assert builder.broken() == {"fencing"}


def test_a_durable_version_that_is_lost_is_seen() -> None:
    builder = HistoryBuilder()
    builder.term(1, 0, 27)
    builder.fault()
    builder.term(2, 10, STEPS)  # 20 was durable
    builder.end()
    assert builder.broken() == {"durability"}


def test_what_one_server_alone_has_committed_may_be_lost() -> None:
    builder = HistoryBuilder()
    builder.term(1, 0, 27)
    builder.drop("committed", -1)
    builder.fault()
    builder.term(2, 10, STEPS)
    builder.end()
    assert builder.broken() == set()


def test_a_rollback_without_bound_is_seen() -> None:
    builder = HistoryBuilder()
    builder.term(1, 0, 27)
    for _ in range(4):
        builder.drop("committed", -1)
    builder.fault()
    builder.term(2, 0, STEPS)
    builder.end()
    assert builder.broken() == {"durability"}


def test_a_commit_that_is_said_to_be_done_and_is_not_is_seen(builder: HistoryBuilder) -> None:
    """The head goes on naming an earlier commit of that version. One that was being read just then says nothing."""
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[30, 2, "n2-30"]])
    builder.record("server", "s0", "committed", term=2, version=30, nonces={"0": "again"})
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[20, 2, "n2-20"], [30, 2, "n2-30"]])
    assert builder.broken() == set()
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[30, 2, "again"]])
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[30, 2, "still newer"]])
    assert builder.broken() == set()
    builder.record("reader", "0", "head", shard=0, term=2, manifests=[[30, 2, "n2-30"]])
    assert builder.broken() == {"durability"}


@pytest.mark.parametrize(
    ("kind", "after_s", "broken"),
    [
        ("kill-zk-quorum", 3.9, set()),
        ("kill-zk-quorum", 4.1, {"lease"}),
        ("zk-stall", 5.9, {"lease"}),
        ("kill-zk-quorum", 6.1, set()),
        ("kill-zk-leader", 4.1, set()),
    ],
)
def test_a_server_that_answers_when_its_session_may_be_over_is_seen(
    kind: str, after_s: float, broken: set[str]
) -> None:
    builder = HistoryBuilder()
    builder.term(1, 0, 27)
    builder.record("harness", "0", "fault", id=0, kind=kind, for_s=6.0)
    builder.record("harness", "0", "fired", id=0, evidence="SIGKILL")
    builder.t += after_s
    builder.step(1, 27)
    builder.t += 6.0
    builder.record("harness", "0", "healed", id=0)
    builder.record("harness", "0", "quiet")
    for step in range(28, STEPS):
        builder.step(1, step)
    builder.end()
    assert builder.broken() == broken


def test_durability_that_was_promised_too_early_is_seen(builder: HistoryBuilder) -> None:
    for index, event in enumerate(builder.events):
        if event.event == "durable":
            builder.events[index] = Event(0.01, "durable", "server", "s0", 1, event.fields)
    assert builder.broken() == {"durability"}


def test_a_fault_that_did_not_happen_is_seen(builder: HistoryBuilder) -> None:
    builder.drop("fired")
    assert builder.broken() == {"fired"}


def test_a_run_without_a_quiet_phase_is_seen(builder: HistoryBuilder) -> None:
    builder.drop("quiet")
    assert builder.broken() == {"fired"}


@pytest.mark.parametrize(("measure", "per_s"), [("rss_mb", 0.5), ("fds", 0.1), ("threads", 0.1)])
def test_what_leaks_is_seen(builder: HistoryBuilder, measure: str, per_s: float) -> None:
    for second in range(600):
        sample = {"rss_mb": 300.0, "fds": 30, "threads": 10}
        sample[measure] += second * per_s
        builder.events.append(Event(second, "sample", "harness", "0", 1, {"role": "worker", "pid": 7, **sample}))
    assert builder.broken() == {"trends"}


def test_processes_that_are_replaced_all_the_time_are_no_leak(builder: HistoryBuilder) -> None:
    for second in range(600):
        sample = {"rss_mb": 300.0 + second % 30, "fds": 30, "threads": 10}
        fields = {"role": "worker", "pid": second // 30, **sample}
        builder.events.append(Event(second, "sample", "harness", "0", 1, fields))
    assert builder.broken() == set()


def test_recovery_lasts_from_the_fault_to_the_next_step(builder: HistoryBuilder) -> None:
    history = History(builder.events)
    (found,) = recoveries(history, steps_of(history))
    assert found.recovery_s == pytest.approx(0.5 + STEP_S, abs=0.01)
    assert found.pause_s == pytest.approx(0.5, abs=0.02)


def test_a_pause_long_after_a_fault_is_not_its_own() -> None:
    builder = HistoryBuilder()
    builder.fault(pause_s=0.0)
    builder.term(1, 0, 5)
    builder.t += 3.0
    builder.step(1, 5)
    builder.t += 3.0
    builder.step(1, 6)
    history = History(builder.events)
    (found,) = recoveries(history, steps_of(history))
    assert found.recovery_s < 3.1


def written(path: Path, lines: Iterable[str]) -> None:
    path.write_text("\n".join(lines))


BEGIN = json.dumps({"t": 1.0, "event": "begin", "role": "worker", "name": "w", "pid": 3})


def test_the_torn_line_of_a_killed_process_is_left_out(tmp_path: Path) -> None:
    written(tmp_path / "worker-w.jsonl", [BEGIN, '{"t": 2.0, "ev'])
    assert [event.event for event in read_history(tmp_path).events] == ["begin"]


def test_a_torn_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    written(tmp_path / "worker-w.jsonl", [BEGIN, '{"t": 2.0, "ev', BEGIN, ""])
    with pytest.raises(DataIntegrity, match=r"worker-w\.jsonl:2"):
        read_history(tmp_path)


def test_the_report_shows_the_verdict_and_how_to_play_it_again(builder: HistoryBuilder, tmp_path: Path) -> None:
    builder.change("final", -1, digest="<G>")
    for step in range(STEPS):
        builder.record("train", "t0", "loss", version=step, rank=0, loss=1.0 / (step + 1))
    history = History(builder.events)
    write_report(
        [Run("kill-server", 7, "psa chaos run --seed 7", history, check_history(history, REFERENCE))], tmp_path
    )
    page = (tmp_path / "report.html").read_text()
    assert (
        "psa chaos run --seed 7" in page and "not those of an undisturbed run" in page and "SIGKILL of a server" in page
    )
    assert "http" not in page.replace("http-equiv", ""), "a page that fetches something from outside"
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_goodput_is_of_the_time_in_which_faults_happen(builder: HistoryBuilder) -> None:
    """After it the job hurries, which must not make up for pauses."""
    steps = steps_of(History(builder.events))
    assert steps.paced == 27 < len(steps.times)
    hurried = Steps(
        [*steps.times[: steps.paced], *(steps.times[26] + i * 1e-4 for i in range(1, 9))],
        [*steps.versions[: steps.paced], *range(28, 36)],
        steps.normal_s,
        steps.paced,
    )
    assert goodput(hurried) == goodput(steps) == pytest.approx(1.0, abs=0.01)
