"""What `psa estimate` foretells: bytes of every kind of job, and time from speeds that are given."""

from __future__ import annotations

from dataclasses import replace

import pytest

from psa_store.cluster import Cell
from psa_store.compression import NONE, Compression, parse_compression
from psa_store.estimate import Forecast, Speeds, Traffic, forecast, traffic_of
from psa_store.estimate.traffic import WorkerShare
from psa_store.job.config import JobConfig, commit_every_default
from psa_store.job.layout import Layout, TensorRole, TensorSpec, make_layout
from psa_store.job.mode import parse_mode
from psa_store.observe.doctor.footprint import footprint_of
from psa_store.optim import AdamW

PAGE_ELEMENTS = 1024
TRAINED = 16 * PAGE_ELEMENTS  # elements, four shards
TRAINED_BYTES = 4 * TRAINED
BUFFER_BYTES = 4096
FROZEN_BYTES = 8192
SHARD_BYTES = 4 * 4096

SPEEDS = Speeds(
    cores=4,
    copy_bytes_per_s=4e9,
    wire_bytes_per_s=1e9,
    check_s=1e-9,
    encode_s=0.0,
    decode_s=0.0,
    update_s=4e-9,
    part_s=1e-9,
    local_update_s=0.0,
    redis_bytes_per_s=1e8,
)


def layout_of(trained: int = TRAINED) -> Layout:
    return make_layout(
        [
            TensorSpec(("weight",), (trained,), "float32", TensorRole.TRAINED),
            TensorSpec(("mean",), (BUFFER_BYTES // 4,), "float32", TensorRole.BUFFER),
            TensorSpec(("table",), (FROZEN_BYTES // 4,), "float32", TensorRole.FROZEN),
        ],
        SHARD_BYTES,
    )


LAYOUT = layout_of()


def job(mode: str = "sync", *, ranks: int = 2, compression: Compression = NONE) -> JobConfig:
    parsed = parse_mode(mode)
    return JobConfig(
        "demo",
        ranks,
        0,
        AdamW().to_dict(),
        LAYOUT.fingerprint,
        commit_every=commit_every_default(parsed),
        mode=parsed,
        compression=compression,
    )


def traffic(config: JobConfig, workers: int = 2, servers: int = 1, *, shared: bool = False) -> Traffic:
    return traffic_of(config, LAYOUT, workers, servers, shares_memory=shared)


def up(found: Traffic) -> list[float]:
    """What each worker sends in a step."""
    return [sum(link.up_bytes for link in links) for links in found.links]


def down(found: Traffic) -> list[float]:
    return [sum(link.down_bytes for link in links) for links in found.links]


class TestBytesOfAStep:
    def test_sync_sends_gradients_of_every_rank_and_buffers_of_rank_0(self) -> None:
        found = traffic(job(ranks=3))
        assert found.ranks == ((0, 1), (2,))
        assert up(found) == [2 * TRAINED_BYTES + BUFFER_BYTES, TRAINED_BYTES]
        assert down(found) == [TRAINED_BYTES + BUFFER_BYTES] * 2, "once for all ranks of a worker"

    def test_on_one_host_only_buffers_travel(self) -> None:
        found = traffic(job(), shared=True)
        assert up(found) == [BUFFER_BYTES, 0] and down(found) == [BUFFER_BYTES] * 2

    def test_a_worker_without_rank_gets_nothing(self) -> None:
        found = traffic(job(ranks=1))
        assert found.ranks == ((0,), ()) and up(found)[1] == down(found)[1] == 0

    def test_links_follow_the_shards(self) -> None:
        found = traffic(job(), servers=2)
        owned_shards = [server.parameter_bytes for server in found.servers]
        assert sum(owned_shards) == LAYOUT.arena_bytes and min(owned_shards) > 0
        (first, second), _ = found.links
        assert first.up_bytes + second.up_bytes == TRAINED_BYTES + BUFFER_BYTES
        assert first.up_bytes == owned_shards[0], "the first server owns trained shards only"

    def test_a_server_beyond_the_shards_owns_nothing(self) -> None:
        found = traffic(job(), servers=9)
        assert len(found.servers) == 9 and any(server.shards == 0 for server in found.servers)
        assert sum(server.shards for server in found.servers) == len(LAYOUT.shards)

    def test_bf16_halves_both_directions(self) -> None:
        found = traffic(job(compression=parse_compression("bf16:both")))
        assert up(found)[1] == TRAINED_BYTES / 2 and down(found)[1] == TRAINED_BYTES / 2 + BUFFER_BYTES

    @pytest.mark.parametrize("shared", [True, False])
    def test_compressed_gradients_always_travel_and_parameters_stay_whole(self, shared: bool) -> None:
        found = traffic(job(compression=parse_compression("int8")), shared=shared)
        assert up(found)[1] == TRAINED + 2 * TRAINED / 256
        assert down(found)[1] == BUFFER_BYTES + (0 if shared else TRAINED_BYTES)

    def test_what_topk_holds_back_is_sent_with_commits(self) -> None:
        config = job(compression=parse_compression("topk:0.25"))
        payload, carried = 8 * TRAINED / 4, TRAINED_BYTES + 4 * 8
        assert up(traffic(config))[1] == pytest.approx(payload + carried / config.commit_every)

    def test_on_arrival_every_rank_fetches_parameters_also_within_a_host(self) -> None:
        found = traffic(job("async", ranks=3), shared=True)
        assert up(found) == [2 * BUFFER_BYTES, BUFFER_BYTES], "gradients are read where they lie"
        assert down(found) == [2 * (TRAINED_BYTES + BUFFER_BYTES), TRAINED_BYTES + BUFFER_BYTES]
        assert up(traffic(job("ssp:staleness=2")))[1] == TRAINED_BYTES + BUFFER_BYTES

    def test_with_backup_ranks_every_rank_sends_buffers(self) -> None:
        assert up(traffic(job("sync:backup=1")))[1] == TRAINED_BYTES + BUFFER_BYTES

    @pytest.mark.parametrize("mode", ["local:steps=8,forget", "local:steps=8,fragments=2,forget"])
    def test_a_round_sends_once_in_all_its_steps(self, mode: str) -> None:
        config = job(mode)
        per_round = config.mode.fragments
        found = traffic(config, shared=True)
        assert up(found) == [(TRAINED_BYTES + per_round * BUFFER_BYTES) / 8, TRAINED_BYTES / 8]
        assert down(found) == [(TRAINED_BYTES + per_round * BUFFER_BYTES) / 8] * 2

    def test_in_rounds_both_directions_are_compressed_and_state_is_added(self) -> None:
        int8 = parse_compression("int8")
        found = traffic(job("local:steps=8,forget", compression=int8))
        assert up(found)[1] == int8.payload_bytes(TRAINED) / 8
        assert down(found)[1] == (int8.payload_bytes(TRAINED) + BUFFER_BYTES) / 8
        config = job("local:steps=8")
        carried = 2 * TRAINED_BYTES + 4 * 8  # AdamW's two averages, and a count in each shard
        assert up(traffic(config))[1] == pytest.approx((TRAINED_BYTES + carried / config.commit_every) / 8)

    def test_a_commit_is_one_version(self) -> None:
        for config in (job(), job("local:steps=8"), job("local:steps=8", compression=parse_compression("int8"))):
            found = traffic(config, servers=3)
            assert found.commit_bytes == footprint_of(config, LAYOUT).version_bytes > TRAINED_BYTES


STAGES, STAGE = 3, 4 * PAGE_ELEMENTS
STAGE_BYTES = 4 * STAGE
IN_STAGES = make_layout(
    [
        TensorSpec((f"{stage}.{name}",), (numel,), "float32", role, stages=(stage,))
        for stage in range(STAGES)
        for name, numel, role in (
            ("weight", STAGE, TensorRole.TRAINED),
            ("mean", BUFFER_BYTES // 4, TensorRole.BUFFER),
            ("table", FROZEN_BYTES // 4, TensorRole.FROZEN),
        )
    ],
    SHARD_BYTES,
)


def in_stages(workers: int, *, ranks: int = 2, shared: bool = False, resident: int | None = None) -> Traffic:
    config = replace(job(ranks=ranks), stages=STAGES, microbatches=4, layout=IN_STAGES.fingerprint)
    return traffic_of(config, IN_STAGES, workers, 1, shares_memory=shared, resident_stages=resident)


class TestStages:
    def test_a_worker_with_one_stage_in_memory_loads_the_others_for_both_kinds_of_passes(self) -> None:
        (alone,) = in_stages(1, resident=1).workers
        whole = STAGE_BYTES + BUFFER_BYTES + FROZEN_BYTES
        assert (alone.parameter_bytes, alone.gradient_bytes) == (whole, STAGE_BYTES)
        assert alone.loads == (1, 2, 1, 0) * 2, "the first is there when a step, or the next rank, begins"
        assert alone.twice == 4, "of each rank the last stage goes forward once"
        for shared, came_with_version in ((False, STAGE_BYTES + BUFFER_BYTES), (True, BUFFER_BYTES)):
            assert down(in_stages(1, shared=shared, resident=1)) == [came_with_version + 8 * whole]

    def test_stages_that_are_in_memory_together_count_together(self) -> None:
        (alone,) = in_stages(1, ranks=1, resident=2).workers
        assert alone.parameter_bytes == 2 * (STAGE_BYTES + BUFFER_BYTES + FROZEN_BYTES)
        assert alone.loads[-1:] == (0,) and alone.twice == 1

    @pytest.mark.parametrize("resident", [None, 3, 7])
    def test_a_worker_with_room_for_all_its_stages_loads_none_again(self, resident: int | None) -> None:
        assert in_stages(1, resident=resident) == in_stages(1)
        assert in_stages(3, resident=1) == in_stages(3), "each has one stage"

    def test_a_worker_sends_gets_and_keeps_its_stages_only(self) -> None:
        found = in_stages(6)
        assert [each.cells for each in found.workers] == [
            (Cell(rank, stage),) for stage in range(STAGES) for rank in range(2)
        ]
        assert up(found) == [STAGE_BYTES + BUFFER_BYTES, STAGE_BYTES] * STAGES, "buffers are those of rank 0"
        assert down(found) == [STAGE_BYTES + BUFFER_BYTES] * 6
        assert {each.parameter_bytes for each in found.workers} == {STAGE_BYTES + BUFFER_BYTES + FROZEN_BYTES}
        assert {each.gradient_bytes for each in found.workers} == {STAGE_BYTES}

    def test_a_stage_of_two_ranks_is_sent_twice_and_kept_once(self) -> None:
        found = in_stages(3)
        assert found.ranks == ((0, 1),) * 3
        assert up(found) == [2 * STAGE_BYTES + BUFFER_BYTES] * 3 and down(found) == [STAGE_BYTES + BUFFER_BYTES] * 3
        assert {each.parameter_bytes for each in found.workers} == {STAGE_BYTES + BUFFER_BYTES + FROZEN_BYTES}
        assert up(in_stages(3, shared=True)) == [BUFFER_BYTES] * 3

    def test_what_is_tied_is_kept_by_each_stage_that_has_it_and_sent_by_the_first(self) -> None:
        tied = make_layout(
            [TensorSpec(("a", "b"), (STAGE,), "float32", TensorRole.TRAINED, stages=(0, 2))], SHARD_BYTES
        )
        config = replace(job(ranks=1), stages=STAGES, layout=tied.fingerprint)
        found = traffic_of(config, tied, 3, 1, shares_memory=False)
        assert up(found) == [STAGE_BYTES, 0, 0] and down(found) == [STAGE_BYTES, 0, STAGE_BYTES]
        assert [each.gradient_bytes for each in found.workers] == [STAGE_BYTES, 0, STAGE_BYTES]

    def test_one_worker_has_the_whole_model_and_more_than_cells_stand_by(self) -> None:
        (alone,) = in_stages(1).workers
        assert alone.parameter_bytes == IN_STAGES.arena_bytes and len(alone.cells) == 2 * STAGES
        found = in_stages(7)
        assert found.workers[6] == WorkerShare((), 0, 0) and up(found)[6] == down(found)[6] == 0

    @pytest.mark.parametrize(("workers", "cuts"), [(1, 0), (2, 2), (3, 4), (6, 4)])
    def test_a_cut_is_where_the_next_stage_is_elsewhere(self, workers: int, cuts: int) -> None:
        assert in_stages(workers).cuts == cuts

    def test_the_bubble_is_known_from_stages_and_microbatches(self) -> None:
        config = job()
        assert config.bubble == 0.0
        assert replace(config, stages=4, microbatches=12).bubble == pytest.approx(3 / 15)


def foretold(
    config: JobConfig, layout: Layout = LAYOUT, *, shared: bool = False, speeds: Speeds = SPEEDS, compute_s: float = 0.0
) -> Forecast:
    found = traffic_of(config, layout, 2, 1, shares_memory=shared)
    return forecast(config, layout, found, speeds, threads=2, compute_s=compute_s)


def parts(found: Forecast) -> dict[str, float]:
    return {term.what: term.seconds for term in found.terms}


class TestTimeOfAStep:
    def test_bytes_take_their_time_on_the_busiest_process(self) -> None:
        config = job()
        found = parts(foretold(config))
        assert found["gradients travel"] == pytest.approx((2 * TRAINED_BYTES + BUFFER_BYTES) / 1e9)
        slower = parts(foretold(config, speeds=replace(SPEEDS, wire_bytes_per_s=1e8)))
        assert slower["gradients travel"] == pytest.approx(10 * found["gradients travel"])
        assert slower["servers: reduce, update"] == found["servers: reduce, update"]

    def test_the_sum_grows_with_ranks_and_a_small_server_uses_one_thread(self) -> None:
        assert parts(foretold(job(ranks=4)))["servers: reduce, update"] == pytest.approx(TRAINED * 7e-9)
        large = layout_of(trained=2 << 20)
        assert parts(foretold(job(ranks=4), large))["servers: reduce, update"] == pytest.approx((2 << 20) * 7e-9 / 2)

    def test_on_arrival_each_rank_is_an_update(self) -> None:
        assert parts(foretold(job("async", ranks=4)))["servers: reduce, update"] == pytest.approx(4 * TRAINED * 4e-9)

    def test_a_step_of_a_round_costs_its_share(self) -> None:
        every, seldom = (parts(foretold(job(f"local:steps={steps},forget"))) for steps in (1, 10))
        for what in ("gradients travel", "servers: reduce, update", "parameters travel", "messages"):
            assert seldom[what] == pytest.approx(every[what] / 10)

    def test_ranks_update_themselves_in_each_step_of_a_round(self) -> None:
        found = parts(foretold(job("local:steps=10"), speeds=replace(SPEEDS, local_update_s=5e-9)))
        assert found["ranks: own update"] == pytest.approx(TRAINED * 5e-9), "two ranks, two workers"

    def test_training_waits_for_a_redis_that_is_slower_than_the_steps_between_commits(self) -> None:
        config = job()
        assert "waiting for Redis" not in parts(foretold(config))
        slow = foretold(config, speeds=replace(SPEEDS, redis_bytes_per_s=1e5))
        assert slow.commit_s is not None and slow.commit_interval_steps == config.commit_every
        assert slow.seconds == pytest.approx(slow.commit_s / config.commit_every)
        assert "waiting for Redis" not in parts(
            foretold(config, speeds=replace(SPEEDS, redis_bytes_per_s=1e5), compute_s=1.0)
        ), "there is time while the script computes"

    def test_what_was_not_measured_is_not_told(self) -> None:
        found = foretold(job(), speeds=replace(SPEEDS, redis_bytes_per_s=None))
        assert found.commit_s is None and "waiting for Redis" not in parts(found)

    def test_computing_is_added_where_it_is_known(self) -> None:
        assert foretold(job(), compute_s=0.04).seconds == pytest.approx(foretold(job()).seconds + 0.04)
