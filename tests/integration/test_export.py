"""A trained job goes to files and comes back, whole, elsewhere, and in other pieces.

One file, since what is exported, damaged, lost and imported here are the same few jobs, made by the same helpers.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import psa_store as psa
from psa_store.checkpoint import creation
from psa_store.checkpoint.files import importing
from psa_store.checkpoint.files.export import export_version, newest_export, open_export, verify_export
from psa_store.checkpoint.files.importing import import_export
from psa_store.checkpoint.reader import StoredVersion, open_version
from psa_store.cli.transfer import export_files, import_files
from psa_store.cluster import Member, ProcessRole
from psa_store.coordination import Coordination
from psa_store.errors import DataIntegrity, JobBusy, JobMismatch, UnknownJob, UsageError
from psa_store.job.config import CREATOR_NODE, JobConfig, job_config_from_json
from psa_store.job.layout import TensorRole, TensorSpec, make_layout
from psa_store.job.mode import parse_mode
from psa_store.optim.tensors import to_torch
from psa_store.storage import RedisStore, ShardState
from psa_store.testing.failpoints import ENV, FailpointAction, arm, hit
from tests.harness import Site

VERSION = 7
SPECS = [
    TensorSpec(("wide",), (70, 50), "float32", TensorRole.TRAINED),
    TensorSpec(("narrow",), (33,), "bfloat16", TensorRole.TRAINED),
    TensorSpec(("head", "tied.head"), (3, 5), "float32", TensorRole.TRAINED, group=1),
    TensorSpec(("seen",), (), "int64", TensorRole.BUFFER),
    TensorSpec(("hidden",), (9,), "float32", TensorRole.BUFFER, persistent=False),
    TensorSpec(("frozen",), (40, 40), "float32", TensorRole.FROZEN),
]


@pytest.fixture
def store(site: Site) -> Iterator[RedisStore]:
    with closing(site.store()) as store:
        store.check()
        yield store


@contextmanager
def coordination(site: Site, job: str) -> Iterator[Coordination]:
    with closing(
        Coordination(site.zookeeper, job, session_timeout_s=4, connect_timeout_s=5, wake=threading.Event().set)
    ) as opened:
        opened.start()
        yield opened


def commit(
    store: RedisStore,
    job: str,
    *,
    shard_bytes: int = 4096,
    version: int = VERSION,
    mode: str = "sync",
    clocks: Mapping[int, list[int]] | None = None,
    seed: int = 0,
    skipped: Mapping[int, int] | None = None,
) -> StoredVersion:
    """Put a job into Redis at one version, with random bits and zeros between tensors.

    ``skipped``: by tensor, from how many updates it was left out.
    """
    layout = make_layout(SPECS, shard_bytes)
    config = JobConfig(job, 2, 3, psa.optim.AdamW(lr=0.1).to_dict(), layout.fingerprint, mode=parse_mode(mode))
    draw = np.random.default_rng(seed)
    store.seal(job, range(len(layout.shards)), 1, layout.fingerprint)
    for shard in layout.shards:
        sections = {"param": shard.dtype}
        if shard.role is TensorRole.TRAINED:
            sections |= {"master": "float32"} if shard.dtype == "bfloat16" else {}
            sections |= {"exp_avg": "float32", "exp_avg_sq": "float32"}
        arrays = {}
        for name, dtype in sections.items():
            whole = torch.zeros(shard.numel, dtype=to_torch(dtype))
            for piece in shard.pieces:
                part = torch.from_numpy(draw.integers(-99, 99, piece.length))
                whole[piece.shard_start : piece.shard_start + piece.length] = part
            arrays[name] = (dtype, whole.view(torch.uint8).numpy().data)
        frozen = shard.role is TensorRole.FROZEN
        its = (
            {f"clock.{rank}": clock for rank, clock in enumerate(clocks.get(shard.index, clocks[0]))} if clocks else {}
        )
        updates = VERSION if shard.role is TensorRole.TRAINED else 0
        left_out = {f"skipped.{t}": n for t, n in (skipped or {}).items() if t in {p.tensor for p in shard.pieces}}
        scalars = {} if frozen else {"opt_step": updates, **its, **left_out}
        state = ShardState(shard.index, arrays, scalars, expect=None)
        list(store.commit_each(job, 1, 0 if frozen else version, [state], keep=3))
    store.create_job(job, config.to_json(), layout.to_json())
    return open_version(store, job)


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an export, as any loader finds them."""
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def as_hugging_face_loads(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "model.safetensors").exists():
        return load_file(folder / "model.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {name: load_file(folder / name) for name in set(index["weight_map"].values())}
    return {key: files[name][key] for key, name in index["weight_map"].items()}


@pytest.mark.parametrize("max_file_bytes", [1 << 30, 7000])
def test_files_hold_the_state_dict(store: RedisStore, site: Site, tmp_path: Path, max_file_bytes: int) -> None:
    version = commit(store, f"files-{max_file_bytes}")
    export = export_version(version, str(tmp_path / "out"), max_file_bytes)
    assert len(list((tmp_path / "out").glob("model*.safetensors"))) == (1 if max_file_bytes > 7000 else 3)
    with psa.Store(version.config.name, site.redis) as reader:
        expected = reader.state_dict()
    found = as_hugging_face_loads(tmp_path / "out")
    assert found.keys() == expected.keys() - {"tied.head"}
    for name, tensor in found.items():
        assert tensor.dtype is expected[name].dtype and torch.equal(tensor, expected[name]), name
    rest = tensors_in(tmp_path / "out").keys() - found.keys()
    slots = {f"{slot}.{name}" for slot in ("exp_avg", "exp_avg_sq") for name in ("wide", "narrow", "head")}
    assert rest == {*slots, "master.narrow", "buffer.hidden"}
    assert not list((tmp_path / "out").glob("*.tmp-*"))
    assert open_export(str(tmp_path / "out")) == export
    verify_export(export)


@pytest.mark.parametrize("shard_bytes", [4096, 8192, 1 << 20])
def test_another_shard_size_and_world_size_hold_the_same(
    store: RedisStore, site: Site, tmp_path: Path, shard_bytes: int
) -> None:
    job = f"moved-{shard_bytes}"
    skipped = {0: 4, 2: 6}
    export = export_version(commit(store, f"{job}-from", skipped=skipped), str(tmp_path / "out"), 7000)
    with coordination(site, job) as ours:
        config = import_export(export, job, store, ours, ranks=5, shard_bytes=shard_bytes)
        assert ours.read_config() == config
    assert (config.ranks, config.seed) == (5, 3)
    again = open_version(store, job)
    assert again.version == VERSION and again.layout.shard_bytes == shard_bytes and again.config == config
    for shard in again.layout.shards:
        its = {piece.tensor for piece in shard.pieces}
        found = {n: v for n, v in again.manifests[shard.index].scalars.items() if n.startswith("skipped.")}
        assert found == {f"skipped.{tensor}": count for tensor, count in skipped.items() if tensor in its}
    export_version(again, str(tmp_path / "again"))
    before, after = tensors_in(tmp_path / "out"), tensors_in(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    if shard_bytes == 4096:
        assert site.digest(job, VERSION) == site.digest(f"{job}-from", VERSION)


def test_clocks_move_to_another_number_of_ranks(store: RedisStore, site: Site, tmp_path: Path) -> None:
    clocks = {0: [4, 2]}
    export = export_version(commit(store, "clocks", version=6, mode="async", clocks=clocks), str(tmp_path / "out"))
    assert (export.version, export.step, export.clocks) == (6, 3, (4, 2))
    for job, ranks, version, expected in (("kept", None, 6, [4, 2]), ("shared", 3, 9, [3, 3, 3])):
        with coordination(site, f"clocks-{job}") as ours:
            import_export(export, f"clocks-{job}", store, ours, ranks=ranks, shard_bytes=8192)
        again = open_version(store, f"clocks-{job}")
        assert again.version == version
        for shard in again.layout.versioned:
            scalars = again.manifests[shard.index].scalars
            assert [scalars[f"clock.{rank}"] for rank in range(len(expected))] == expected
            assert scalars["opt_step"] == (VERSION if shard.role is TensorRole.TRAINED else 0)


def test_shards_of_different_steps_are_not_exported(store: RedisStore, tmp_path: Path) -> None:
    version = commit(store, "ragged", version=6, mode="async", clocks={0: [4, 2], 1: [3, 3]})
    with pytest.raises(UsageError, match=r"pushes of different steps.*Export a checkpoint"):
        export_version(version, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# --- damage


def damaged(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "torn":
        del data[-1:]
    elif how == "flipped":
        data[len(data) // 2] ^= 1
    path.unlink()
    if how != "missing":
        path.write_bytes(data)


@pytest.fixture(scope="module")
def two_exports(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An older export and a newer one, the newer in several files."""
    folder = tmp_path_factory.mktemp("exports")
    with closing(site.store()) as store:
        store.check()
        export_version(commit(store, "damage"), str(folder / "old"))
        newer = commit(store, "damage-newer", version=8)
        export_version(newer, str(folder / "new"), 7000)
    return folder


FILES = ["psa.json", "model.safetensors.index.json", "optimizer.safetensors.index.json"] + [
    f"{stem}-{number:05d}-of-{count:05d}.safetensors"
    for stem, count in (("model", 3), ("optimizer", 5))
    for number in range(1, count + 1)
]


def test_the_files_of_an_export_are_these(two_exports: Path) -> None:
    assert sorted(path.name for path in (two_exports / "new").iterdir()) == sorted(FILES)


@pytest.mark.parametrize("how", ["torn", "flipped", "missing"])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_and_the_export_before_is_used(two_exports: Path, tmp_path: Path, name: str, how: str) -> None:
    for each in two_exports.iterdir():
        (tmp_path / each.name).mkdir()
        for path in each.iterdir():
            (tmp_path / each.name / path.name).write_bytes(path.read_bytes())
    newest, passed = newest_export(str(tmp_path))
    assert newest is not None and newest.version == 8 and passed == []
    damaged(tmp_path / "new" / name, how)
    newest, passed = newest_export(str(tmp_path))
    assert newest is not None and newest.url == str(tmp_path / "old") and newest.version == VERSION
    ((where, why),) = passed
    assert where == str(tmp_path / "new") and name in why


def test_a_damaged_export_creates_no_job(store: RedisStore, site: Site, two_exports: Path, tmp_path: Path) -> None:
    for path in (two_exports / "old").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damaged(tmp_path / "model.safetensors", "flipped")
    with coordination(site, "never") as ours, pytest.raises(DataIntegrity, match=r"model\.safetensors: damaged"):
        import_export(open_export(str(tmp_path)), "never", store, ours)
    assert not store.has_job("never") and not store.heads("never", [0])[0].term


def test_only_exports_of_the_job_are_looked_at(two_exports: Path) -> None:
    newest, _ = newest_export(str(two_exports), "damage")
    assert newest is not None and newest.config.name == "damage"
    assert newest_export(str(two_exports), "another") == (None, [])
    assert newest_export(str(two_exports / "absent")) == (None, [])


def test_what_was_written_last_is_the_newest_though_its_version_is_lower(store: RedisStore, tmp_path: Path) -> None:
    version = commit(store, "rolled", version=9)
    before = export_version(version, str(tmp_path / "b-before"))
    after = export_version(replace(version, version=8), str(tmp_path / "a-after-a-rollback"))
    assert after.created > before.created and newest_export(str(tmp_path)) == (after, [])


def test_files_of_others_are_neither_overwritten_nor_imported(store: RedisStore, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"precious")
    with pytest.raises(UsageError, match=r"'model\.safetensors' is in it"):
        export_version(commit(store, "polite"), str(tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == b"precious"
    with pytest.raises(UsageError, match=r"no psa\.json in it"):
        open_export(str(tmp_path))


@pytest.mark.parametrize(
    "left", [["model.safetensors.tmp-00"], ["model.safetensors", "optimizer.safetensors.tmp-00", "psa.json.tmp-00"]]
)
def test_what_a_dead_exporter_left_is_replaced(store: RedisStore, tmp_path: Path, left: list[str]) -> None:
    version = commit(store, f"dead-{len(left)}")
    for name in left:
        (tmp_path / name).write_bytes(b"half")
    verify_export(export_version(version, str(tmp_path)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model.safetensors",
        "optimizer.safetensors",
        "psa.json",
    ]


def test_an_export_that_fails_leaves_nothing(store: RedisStore, tmp_path: Path) -> None:
    version = commit(store, "failing")
    key = version.manifests[version.layout.shards[-1].index].chunk_keys("failing", version.layout.shards[-1].index)[0]
    store._client.set(key, b"x")
    with pytest.raises(DataIntegrity):
        export_version(version, str(tmp_path / "out"))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_version_that_was_replaced_meanwhile_is_no_damage(store: RedisStore, tmp_path: Path) -> None:
    version = commit(store, "replaced")
    state = ShardState(0, {"param": ("float32", memoryview(bytes(4096)))}, {}, expect=None)
    list(store.commit_each("replaced", 1, VERSION + 1, [state], keep=1))
    with pytest.raises(UsageError, match="version 7 was replaced by newer ones"):
        export_version(version, str(tmp_path / "out"))


# --- other file systems


def test_memory_file_system(store: RedisStore, site: Site) -> None:
    version = commit(store, "memory-from")
    export = export_version(version, "memory://psa-tests/exports/one", 7000)
    files = fsspec.filesystem("memory")
    assert len(files.ls("/psa-tests/exports/one")) == len(FILES)
    newest, passed = newest_export("memory://psa-tests/exports")
    assert newest == export and passed == []
    with coordination(site, "memory") as ours:
        import_export(newest, "memory", store, ours)
    assert site.digest("memory", VERSION) == site.digest("memory-from", VERSION)
    files.pipe_file("/psa-tests/exports/one/model-00002-of-00003.safetensors", b"torn")
    with pytest.raises(DataIntegrity, match="4 bytes long, written were"):
        verify_export(export)


def test_file_urls(store: RedisStore, tmp_path: Path) -> None:
    export_version(commit(store, "url"), f"file://{tmp_path}/deep/out")
    newest, _ = newest_export(f"file://{tmp_path}/deep")
    assert newest is not None and newest.url == f"file://{tmp_path}/deep/out"
    assert (tmp_path / "deep" / "out" / "psa.json").exists()


def test_an_unknown_file_system_is_bad_usage(store: RedisStore) -> None:
    with pytest.raises(UsageError, match="nowhere://x"):
        export_version(commit(store, "nowhere"), "nowhere://x")


def test_the_command_does_not_show_the_password_of_a_file_system(store: RedisStore, site: Site) -> None:
    commit(store, "secretive")
    done = site.told("checkpoint", "export", "secretive", "ftp://user:hidden@127.0.0.1:1/x")
    said = done.stdout + done.stderr
    assert done.returncode == 3 and len(said.splitlines()) == 1, said
    assert "ftp://user:***@127.0.0.1:1/x" in said and "hidden" not in said


# --- jobs that exist


def test_an_existing_job_is_not_touched(store: RedisStore, site: Site, tmp_path: Path) -> None:
    export = export_version(commit(store, "taken"), str(tmp_path))
    before = site.digest("taken", VERSION)
    with coordination(site, "taken") as ours, pytest.raises(UsageError, match="exists in Redis"):
        import_export(export, "taken", store, ours)
    assert site.digest("taken", VERSION) == before


def test_one_process_creates_a_job(
    store: RedisStore, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(creation, "_GRACE_S", 0.1)
    export = export_version(commit(store, "held-from"), str(tmp_path))
    with coordination(site, "held") as ours, coordination(site, "held") as theirs:
        assert theirs.hold(CREATOR_NODE, "another") is None
        with pytest.raises(JobBusy, match="another creates it"):
            import_export(export, "held", store, ours)


def lose(store: RedisStore, version: StoredVersion) -> None:
    """Redis loses the job."""
    store.delete_job(version.config.name, len(version.layout.shards))


def test_a_job_that_redis_lost_is_restored(
    store: RedisStore, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = commit(store, "export-lost")
    before = site.digest("export-lost", VERSION)
    export = export_version(version, str(tmp_path))
    with coordination(site, "export-lost") as ours:
        ours.create_config(version.config)
        lose(store, version)
        with pytest.raises(UsageError, match="exists in ZooKeeper, but Redis"):
            import_export(export, "export-lost", store, ours)
        with pytest.raises(JobMismatch, match="ranks=2"):
            import_export(export, "export-lost", store, ours, ranks=3, restore=True)
        with pytest.raises(JobMismatch, match="shard size"):
            import_export(export, "export-lost", store, ours, shard_bytes=8192, restore=True)
        ours.join(ProcessRole.SERVER, Member("server-1", "node-a/boot", 4711))
        with pytest.raises(JobBusy, match="server-1"):
            import_export(export, "export-lost", store, ours, restore=True)
        ours.leave(ProcessRole.SERVER, "server-1")
        # The restore has just found it whole: nothing is read twice.
        monkeypatch.setattr(importing, "verify_export", lambda export: pytest.fail("it is read once more"))
        import_export(export, "export-lost", store, ours, restore=True)
    assert site.digest("export-lost", VERSION) == before


def test_what_a_dead_importer_left_is_not_mixed_in(store: RedisStore, site: Site, tmp_path: Path) -> None:
    """It had a newer version, and a smaller shard size: more shards, with another fingerprint."""
    export = export_version(commit(store, "clean-from"), str(tmp_path))
    left = commit(store, "clean", version=VERSION + 5, seed=9)
    store._client.delete("psa:{clean}:config", "psa:{clean}:layout")
    with coordination(site, "clean") as ours:
        import_export(export, "clean", store, ours, shard_bytes=16384)
    again = open_version(store, "clean")
    assert again.version == VERSION
    assert len(again.layout.shards) < len(left.layout.shards)
    assert not list(store._client.scan_iter(f"psa:{{clean:{len(left.layout.shards) - 1}}}:*"))
    assert max(head.term for head in store.heads("clean", range(len(again.layout.shards)))) > 1


@pytest.mark.parametrize("where", ["create.sealed", "commit.chunk", "commit.after_flip", "create.before_documents"])
def test_an_importer_that_dies_leaves_no_job_and_may_be_run_again(
    store: RedisStore, site: Site, tmp_path: Path, where: str
) -> None:
    job = where.replace(".", "-")
    before = export_version(commit(store, f"{job}-from"), str(tmp_path / "out"))
    points = tmp_path / "points"
    points.mkdir()
    arm(points, where, FailpointAction.KILL, 3 if where == "commit.chunk" else 0)
    command = ["checkpoint", "import", tmp_path / "out", "--as", job, "--shard-bytes", 16384]
    assert site.told(*command, env={ENV: str(points)}).returncode == -signal.SIGKILL
    assert hit(points, where)
    with pytest.raises(UnknownJob):
        open_version(store, job)
    again = site.told(*command, env={ENV: str(points)})
    assert again.returncode == 0, again.stderr
    export_version(open_version(store, job), str(tmp_path / "again"))
    found, expected = tensors_in(tmp_path / "again"), tensors_in(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert open_version(store, job).version == before.version


# --- going on

HALF, WHOLE = 20, 40


def train(site: Site, job: str, steps: int, *options: str, servers: int = 1) -> None:
    arguments = ("--steps", str(steps), "--total", str(WHOLE), "--pace-s", "0", *options)
    run = site.run(job, *arguments, workers=2, servers=servers, ranks=2, commit_every=10)
    assert run.finish() == 0, run.output


def test_an_imported_job_goes_on_with_the_same_bits(store: RedisStore, site: Site, tmp_path: Path) -> None:
    """With clipping, schedule, buffers, frozen, tied and bfloat16 tensors; and on another number of servers."""
    train(site, "whole", WHOLE)
    train(site, "half", HALF)
    export_files("half", None, str(tmp_path / "out"), site.settings)
    import_files(str(tmp_path / "out"), "other-half", site.settings, None, None)
    assert site.digest("other-half", HALF) == site.digest("half", HALF)
    train(site, "other-half", WHOLE, servers=2)
    assert site.digest("other-half", WHOLE) == site.digest("whole", WHOLE)


def test_so_does_one_with_another_shard_size(store: RedisStore, site: Site, tmp_path: Path) -> None:
    train(site, "whole-small", WHOLE, "--clip", "0")
    train(site, "half-small", HALF, "--clip", "0")
    export_files("half-small", None, str(tmp_path / "out"), site.settings)
    import_files(str(tmp_path / "out"), "other-large", site.settings, None, 12288)
    train(site, "other-large", WHOLE, "--clip", "0", "--shard-bytes", "12288")
    for job in ("whole-small", "other-large"):
        export_files(job, WHOLE, str(tmp_path / job), site.settings)
    found, expected = tensors_in(tmp_path / "other-large"), tensors_in(tmp_path / "whole-small")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@pytest.mark.parametrize("options", [{"mode": "async"}, {"mode": "local:steps=2"}, {"compress": "topk:0.1"}], ids=str)
def test_jobs_of_other_modes_go_on(store: RedisStore, site: Site, tmp_path: Path, options: dict[str, str]) -> None:
    """With all rank state where the shards stay, without where they are cut anew."""
    job = "-".join(options.values()).translate(str.maketrans(":=.", "---"))
    steps = ("--bufferless", "--pace-s", "0", "--clip", "0", "--total", "30")
    run = site.run(job, "--steps", "20", *steps, workers=1, servers=1, ranks=1, commit_every=5, **options)
    assert run.finish() == 0, run.output
    export_files(job, None, str(tmp_path / "out"), site.settings)
    import_files(str(tmp_path / "out"), f"{job}-same", site.settings, None, None)
    version = open_version(store, job).version
    assert site.digest(f"{job}-same", version) == site.digest(job, version)
    import_files(str(tmp_path / "out"), f"{job}-other", site.settings, 3, 16384)
    again = site.run(f"{job}-other", "--steps", "30", "--shard-bytes", "16384", *steps, workers=2, servers=1)
    assert again.finish() == 0, again.output
    assert "finished" in again.output


def test_cli_functions_say_what_they_did(
    store: RedisStore, site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commit(store, "spoken")
    export_files("spoken", None, str(tmp_path / "out"), site.settings)
    import_files(str(tmp_path / "out"), "spoken-again", site.settings, None, None)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and said[0].startswith("exported version 7 of job 'spoken'")
    assert said[1] == "created job 'spoken-again' at step 7 from version 7 of 'spoken': 2 ranks, mode sync"
    with closing(site.store()) as other:
        found = other.read_job("spoken-again")
        assert found is not None and job_config_from_json(found[0]).name == "spoken-again"
