"""The folder of automatic exports: what is in it is what Redis had under that name, and failures leave nothing."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from psa_store.checkpoint import catalog
from psa_store.checkpoint.catalog import Reason
from psa_store.checkpoint.files.archive import Archive
from psa_store.checkpoint.files.export import open_export, verify_export
from psa_store.checkpoint.files.manifest import Export
from psa_store.checkpoint.take import take_at_rest
from psa_store.errors import DataIntegrity, DependencyUnreachable, UsageError
from psa_store.server.exporting import Exporter
from psa_store.storage import RedisStore
from tests.harness import Site
from tests.integration.test_export import VERSION, commit, damaged

PATIENCE_S = 120.0


@pytest.fixture
def store(site: Site) -> Iterator[RedisStore]:
    with closing(site.store()) as store:
        store.check()
        yield store


def take(store: RedisStore, job: str, name: str) -> None:
    """Take a checkpoint of this name, in the place of one that has it."""
    stored = catalog.read_job(store, job)
    catalog.remove(store, job, stored.layout, [name])
    take_at_rest(store, job, name, Reason.ASKED)


def test_a_name_that_is_used_again_is_written_again(store: RedisStore, tmp_path: Path) -> None:
    commit(store, "again")
    take(store, "again", "best")
    archive = Archive(str(tmp_path), "again")
    first = archive.write(store, "best")
    assert archive.write(store, "best") == first, "it was written twice"
    commit(store, "again", version=VERSION + 1, seed=1)
    take(store, "again", "best")
    second = archive.write(store, "best")
    assert second.version == VERSION + 1 and open_export(first.url) == second
    verify_export(second)


def test_so_is_the_same_version_of_another_history(store: RedisStore, tmp_path: Path) -> None:
    archive = Archive(str(tmp_path), "history")
    origins = []
    for seed in (1, 2):
        commit(store, "history", seed=seed)
        take(store, "history", "best")
        origins.append(archive.write(store, "best").origin)
        store.delete_job("history", len(catalog.read_job(store, "history").layout.shards))
    assert open_export(f"{archive.folder}/best").origin == origins[1] != origins[0]


@pytest.mark.parametrize("how", ["torn", "flipped", "missing"])
def test_a_damaged_or_unfinished_export_is_written_again(store: RedisStore, tmp_path: Path, how: str) -> None:
    commit(store, f"mend-{how}")
    take(store, f"mend-{how}", "best")
    archive = Archive(str(tmp_path), f"mend-{how}")
    archive.write(store, "best")
    damaged(tmp_path / f"mend-{how}" / "best" / "psa.json", how)
    verify_export(archive.write(store, "best"))


def test_files_of_others_stay(store: RedisStore, tmp_path: Path) -> None:
    commit(store, "guest")
    take(store, "guest", "best")
    precious = tmp_path / "guest" / "best" / "notes.txt"
    precious.parent.mkdir(parents=True)
    precious.write_text("precious")
    with pytest.raises(UsageError, match=r"'notes\.txt' is in it"):
        Archive(str(tmp_path), "guest").write(store, "best")
    assert precious.read_text() == "precious"


def test_a_failed_export_leaves_no_folder(store: RedisStore, tmp_path: Path) -> None:
    version = commit(store, "failed")
    take(store, "failed", "best")
    store._client.delete(version.manifests[0].chunk_keys("failed", 0)[0])
    with pytest.raises(DataIntegrity):
        Archive(str(tmp_path), "failed").write(store, "best")
    assert list((tmp_path / "failed").iterdir()) == []


def test_the_last_is_told_by_manifests_alone(store: RedisStore, tmp_path: Path) -> None:
    archive = Archive(str(tmp_path), "told")
    assert archive.is_empty() and archive.last() is None
    commit(store, "told")
    take(store, "told", "best")
    export = archive.write(store, "best")
    (tmp_path / "told" / "best" / "model.safetensors").unlink()
    assert archive.last() == export and not archive.is_empty()
    with pytest.raises(DataIntegrity, match="no whole checkpoint"):
        archive.newest()
    damaged(tmp_path / "told" / "best" / "psa.json", "flipped")
    assert archive.last() is None and not archive.is_empty()


def test_pruning_counts_what_was_finished_and_keeps_the_newest(tmp_path: Path) -> None:
    names = [f"20260101-00000{number}" for number in range(6)]
    for number, name in enumerate(names):
        (tmp_path / "job" / name).mkdir(parents=True)
        if number not in (1, 4, 5):
            (tmp_path / "job" / name / "psa.json").write_text("{}")
    (tmp_path / "job" / "by-hand").mkdir()
    archive = Archive(str(tmp_path), "job")
    assert archive.prune(2, None) == names[:2]
    assert archive.prune(2, older_than_s=1) == [names[2]]
    assert sorted(each.name for each in (tmp_path / "job").iterdir()) == [*names[3:], "by-hand"]


class Slow:
    """An archive whose file system takes until it is told to go on."""

    def __init__(self, fail: Callable[[str], Exception | None] = lambda name: None) -> None:
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.written: list[str] = []
        self.pruned = 0
        self._fail = fail

    def write(self, store: RedisStore, name: str) -> Export:
        self.written.append(name)
        self.begun.set()
        assert self.go_on.wait(PATIENCE_S)
        raise self._fail(name) or DependencyUnreachable("away")

    def prune(self, keep: int, older_than_s: float | None) -> list[str]:
        self.pruned += 1
        return []


def exporter(archive: Any, tell: Callable[[str], None] = lambda text: None) -> Exporter:
    return Exporter(None, archive, 1, None, tell)  # type: ignore[arg-type]  # this archive reads nothing


def test_what_waits_is_replaced_by_what_is_newer() -> None:
    slow = Slow()
    ours = exporter(slow)
    ours.submit("first")
    assert slow.begun.wait(PATIENCE_S)
    for name in ("second", "third", "fourth"):
        ours.submit(name)
    slow.go_on.set()
    ours.close()
    assert slow.written == ["first", "fourth"] and slow.pruned == 2


def test_closing_waits_only_so_long_and_the_thread_keeps_no_process() -> None:
    slow = Slow()
    ours = exporter(slow)
    ours.submit("first")
    assert slow.begun.wait(PATIENCE_S)
    ours.close(timeout_s=0.1)
    assert ours._thread.is_alive() and ours._thread.daemon
    slow.go_on.set()
    ours._thread.join(PATIENCE_S)
    assert not ours._thread.is_alive()


def test_a_fault_is_told_and_the_next_one_written() -> None:
    told: queue.SimpleQueue[str] = queue.SimpleQueue()
    slow = Slow(lambda name: RuntimeError("a fault of ours") if name == "first" else None)
    slow.go_on.set()
    ours = exporter(slow, told.put)
    ours.submit("first")
    assert "a fault of ours" in told.get(timeout=PATIENCE_S)
    ours.submit("second")
    ours.close()
    assert "away" in told.get(timeout=PATIENCE_S) and slow.written == ["first", "second"]
