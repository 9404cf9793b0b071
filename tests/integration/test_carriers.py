"""Memory of one host, or TCP: which of them carries a job does not show in its bits, and neither leaves anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import psutil
import pytest

from psa_store.cluster import ProcessRole
from tests.harness import TRAIN, Run, Site
from tests.integration.peers import Scene, coordination, descriptors, look, memfd_mappings

READER = Path(__file__).parent / "reader.py"
STEPS = 100
LARGE_FLOATS = 16 << 20
PATIENCE_S = 120.0
LINGER_S = 0.5
"""Many times as long as a step takes."""


def start(site: Site, job: str, *arguments: str, carrier: str = "auto", **options: object) -> Run:
    defaults: dict[str, object] = {"workers": 1, "servers": 1, "ranks": 2, "commit_every": 0}
    return site.run(job, *arguments, env={"PSA_CARRIER": carrier}, **{**defaults, **options})


def join(site: Site, carrier: str, *arguments: str) -> Run:
    return site.psa("worker", *arguments, env={"PSA_CARRIER": carrier})


# --- what can be seen of a carrier from outside


def shares_memory_with(scene: Scene, worker: str) -> bool:
    """Whether this worker shows parameters in the memory of a server."""
    servers = [f"/memfd:psa-{server} " for server in scene.servers]
    return any(name in line for name in servers for line in memfd_mappings(scene.workers[worker].pid))


def gradients_read_in_place(scene: Scene) -> int:
    """How many ranks' gradients the servers read where workers have written them."""
    return sum("/memfd:psa-gradient " in line for pid in scene.pids for line in memfd_mappings(pid))


def talks_tcp_to(scene: Scene, worker: str) -> bool:
    ports = {int(server.address.rpartition(":")[2]) for server in scene.servers.values()}
    connections = psutil.Process(scene.workers[worker].pid).net_connections("tcp")
    return any(each.raddr and each.raddr.port in ports for each in connections)


class TestBits:
    TRAINING = ("--steps", str(STEPS), "--pace-s", "0.01")

    @pytest.fixture(scope="class")
    @staticmethod
    def undisturbed(site: Site) -> str:
        run = start(site, "carriers-auto", *TestBits.TRAINING)
        try:
            run.wait_for_step(10)
            with look(site, "carriers-auto") as scene:
                (worker,) = scene.workers
                assert shares_memory_with(scene, worker) and not talks_tcp_to(scene, worker)
                assert gradients_read_in_place(scene) == scene.ranks
            assert run.finish() == 0, run.output
        finally:
            run.kill()
        return site.digest("carriers-auto", STEPS)

    def test_tcp_gives_the_bits_of_shared_memory(self, site: Site, undisturbed: str) -> None:
        run = start(site, "carriers-tcp", *self.TRAINING, carrier="tcp")
        run.wait_for_step(10)
        with look(site, "carriers-tcp") as scene:
            (worker,) = scene.workers
            assert talks_tcp_to(scene, worker) and not shares_memory_with(scene, worker)
            assert gradients_read_in_place(scene) == 0
        assert run.finish() == 0, run.output
        assert site.digest("carriers-tcp", STEPS) == undisturbed

    def test_both_at_once_give_the_same_bits(self, site: Site, undisturbed: str) -> None:
        run = start(site, "carriers-both", *self.TRAINING, "--meet", "2")
        run.wait_for_step(10)
        guest = join(site, "tcp", str(TRAIN), "--job", "carriers-both", *self.TRAINING)
        run.wait_for_line(lambda line: "workers changed" in line)
        run.wait_for_line(lambda line: line.startswith("step "))
        run.wait_for_line(lambda line: line.startswith("step "))
        with look(site, "carriers-both") as scene:
            near, far = sorted(scene.plan.cells, key=lambda worker: scene.workers[worker].pid == guest.process.pid)
            assert shares_memory_with(scene, near) and not talks_tcp_to(scene, near)
            assert talks_tcp_to(scene, far) and not shares_memory_with(scene, far)
            assert gradients_read_in_place(scene) >= 1
        assert run.finish() == 0 and guest.finish() == 0, run.output + guest.output
        assert site.digest("carriers-both", STEPS) == undisturbed


class TestReaders:
    def test_a_worker_that_lost_its_rank_reads_one_version_for_as_long_as_it_likes(
        self, site: Site, tmp_path: Path
    ) -> None:
        job, steps, wake = "carriers-asleep", 60, tmp_path / "wake"
        calm = start(site, job + "-not", "--steps", str(steps), script=READER, ranks=1)
        assert calm.finish() == 0, calm.output

        arguments = ["--steps", str(steps), "--asleep-at", "8", "--until", str(wake)]
        run = start(site, job, *arguments, script=READER, ranks=1)
        before = run.wait_for_line(lambda line: line.startswith("asleep ")).split()[1:]
        guest = join(site, "auto", str(READER), "--job", job, "--steps", str(steps))
        self.let_the_rank_go_to_another(site, job)
        guest.wait_for_step(20)
        wake.touch()
        after = run.wait_for_line(lambda line: line.startswith("awake ")).split()[1:]
        assert before == after and before[0] == "8", "the model changed under the eyes of its script"
        assert run.finish() == 0 and guest.finish() == 0, run.output + guest.output
        assert "leaving memory to workers that still read it" in run.output
        assert site.digest(job, steps) == site.digest(job + "-not", steps)

    def test_a_version_stays_until_the_holder_of_a_rank_has_done_with_it(self, site: Site, tmp_path: Path) -> None:
        """All gradients of step 8 are there, but user code may still read: the update has to wait."""
        job, wake = "carriers-reading", tmp_path / "wake"
        arguments = ["--steps", "12", "--asleep-at", "8", "--pushed", "--until", str(wake)]
        run = start(site, job, *arguments, script=READER, ranks=1)
        before = run.wait_for_line(lambda line: line.startswith("asleep ")).split()[1:]
        with look(site, job) as scene:
            onlooker = scene.peer("tcp")
            onlooker.hello()
            onlooker.see_version(8)
            onlooker.sock.settimeout(LINGER_S)
            with pytest.raises(TimeoutError):
                onlooker.see_version(9)
        wake.touch()
        after = run.wait_for_line(lambda line: line.startswith("awake ")).split()[1:]
        assert before == after, "the model changed under the eyes of its script"
        assert run.finish() == 0, run.output

    def let_the_rank_go_to_another(self, site: Site, job: str) -> None:
        """The controller is told that the holder is dead, which it is not.

        It joins again at once, under another id, and may be given the rank again.
        """
        with closing(coordination(site, job)) as zookeeper:
            zookeeper.start()
            scene = look(site, job)
            (first,) = scene.plan.cells
            pid = scene.workers[first].pid
            wait_until(lambda: len(zookeeper.members(ProcessRole.WORKER)) == 2, "the guest is there")

            def has_gone() -> bool:
                scene = look(site, job)
                (holder,) = scene.plan.cells
                if holder == first or holder not in scene.workers:
                    zookeeper.remove(ProcessRole.WORKER, first)
                elif scene.workers[holder].pid == pid:
                    zookeeper.remove(ProcessRole.WORKER, holder)
                else:
                    return True
                return False

            wait_until(has_gone, "the guest has the rank")


class TestNothingStaysBehind:
    def test_when_all_processes_are_killed_the_kernel_has_all_memory_back(self, site: Site) -> None:
        job, others, before = "carriers-killed", held_anywhere(), shared_bytes()
        run = start(site, job, "--steps", "1000000", "--floats", str(LARGE_FLOATS), script=READER)
        run.wait_for_step(3)
        with look(site, job) as scene:
            pids = [*scene.pids, *(worker.pid for worker in scene.workers.values())]
        inodes = {inode for pid in pids for inode in memory_held_by(pid)}
        used_bytes = 4 * LARGE_FLOATS * (1 + scene.ranks)  # parameters, and a gradient of each rank
        assert len(inodes) >= 1 + scene.ranks
        run.kill()
        wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), "the processes have ended")
        wait_until(lambda: not (inodes & held_anywhere()), "no process holds memory of the run")
        if others or held_anywhere():
            pytest.skip("others share memory on this machine now, so what the kernel has back cannot be told")
        wait_until(lambda: shared_bytes() < before + used_bytes / 20, "the kernel has it back")


def wait_until(holds: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.02)  # /proc sends no events: polled until the deadline


def shared_bytes() -> int:
    """Memory of this machine that is shared, which is where a memfd counts."""
    (line,) = [each for each in Path("/proc/meminfo").read_text().splitlines() if each.startswith("Shmem:")]
    return int(line.split()[1]) * 1024


def held_anywhere() -> set[str]:
    """The inodes of psa_store's memory that any process of this machine holds."""
    return {inode for pid in psutil.pids() for inode in memory_held_by(pid)}


def memory_held_by(pid: int) -> set[str]:
    """The inodes of psa_store's memory that a process maps or has open."""
    held = {line.split()[4] for line in memfd_mappings(pid)}
    for path, what in descriptors(pid).items():
        if what.startswith("/memfd:psa-"):
            with suppress(OSError):  # closed meanwhile
                held.add(str(os.stat(path).st_ino))
    return held
