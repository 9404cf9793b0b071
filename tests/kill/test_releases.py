"""Two neighbouring releases in one job: an update is a rolling restart.

The former one comes from the history of the checkout, and shares our interpreter and libraries. It knows no key, no
TLS, and no credentials of ZooKeeper, so this job has none. Each has its turn as the controller that the other one
follows, and as the worker of the other's servers.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
import tarfile
from contextlib import closing
from pathlib import Path

import pytest
from kazoo.security import OPEN_ACL_UNSAFE

from chaos.neighbour import plain_client
from tests.harness import Run, Site

FORMER = "d42a3f02"
"""Protocol 8, as now; the commit before a connection could begin with the proof of a key."""
ROOT = Path(__file__).parents[2]
TOTAL = ("--total", "1000")
RUNNING = ("--steps", "1000000", "--pace-s", "0.03", "--meet", "2", *TOTAL)
_STEP = re.compile(r"^step \d+ term (\d+)")

pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the packages of each release lie."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", FORMER, "psa_store", "chaos"], capture_output=True, check=False
    )
    if archive.returncode:
        pytest.skip(f"this checkout has no commit {FORMER}: a whole clone has")
    folder = tmp_path_factory.mktemp("former")
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(folder, filter="data")
    found = {"former": folder, "present": ROOT}
    for root in found.values():
        command = [sys.executable, "-c", "import psa_store; print(psa_store.__file__)"]
        said = subprocess.run(command, env=environment(root), capture_output=True, text=True, check=True).stdout
        assert Path(said.strip()).is_relative_to(root), "it would be the other release"
    return found


@pytest.fixture(scope="module")
def open_site(site: Site) -> Site:
    """A folder of the ZooKeeper of all tests in which each client may do everything."""
    with closing(plain_client(site.zookeeper)) as client:
        client.start()
        client.create("/releases", acl=OPEN_ACL_UNSAFE)
        client.stop()
    return Site(site.redis, site.zookeeper.rpartition("@")[2] + "/releases", site.home)


def environment(root: Path) -> dict[str, str]:
    return {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "PSA_RANKS": "2", "PSA_COMMIT_EVERY": "10"}


def serve(site: Site, job: str, root: Path) -> Run:
    return site.psa("server", "--job", job, env=environment(root))


def work(site: Site, job: str, root: Path) -> Run:
    return site.psa("worker", str(root / "chaos" / "train.py"), "--job", job, *RUNNING, env=environment(root))


def wait_for_later_term(worker: Run) -> None:
    """Wait until it steps in a term after those that it has shown."""
    seen = max((int(found[1]) for line in worker.lines if (found := _STEP.match(line))), default=0)
    worker.wait_for_line(lambda line: (found := _STEP.match(line)) is not None and int(found[1]) > seen)


def take_over(heir: Run) -> None:
    """Wait until this server is the controller, and has made a plan."""
    heir.wait_for_line(lambda line: "elected controller" in line)
    heir.wait_for_line(lambda line: "new term" in line)


@pytest.mark.parametrize(("first", "second"), [("former", "present"), ("present", "former")])
def test_a_job_goes_from_one_release_to_the_other_and_back_with_equal_bits(
    open_site: Site, releases: dict[str, Path], first: str, second: str
) -> None:
    site, job = open_site, f"releases-{first}"
    old, new = releases[first], releases[second]
    server, worker = serve(site, job, old), work(site, job, old)
    worker.wait_for_step(5)
    next_server, next_worker = serve(site, job, new), work(site, job, new)
    worker.wait_for_line(lambda line: line == "met 2")
    site.wait_until_serving(worker, job, 2)

    described = site.describe(job)
    assert [each.pid for each in described.servers if each.id == described.controller] == [server.pid]
    server.kill()
    take_over(next_server)
    wait_for_later_term(worker)

    back = serve(site, job, old)
    site.wait_until_serving(worker, job, 2)
    worker.kill()
    next_worker.wait_for_step(1)
    next_server.kill()
    take_over(back)
    wait_for_later_term(next_worker)

    next_worker.process.terminate()
    assert next_worker.finish() == 0, next_worker.output
    last = site.describe(job).committed
    back.process.terminate()
    assert back.finish() == 0, back.output
    for each in (server, worker, next_server, next_worker, back):
        assert "set aside" not in each.output and "refused" not in each.output, each.output
    calm = site.run(f"{job}-not", "--steps", str(last), "--pace-s", "0", *TOTAL, workers=1, servers=1, ranks=2)
    assert calm.finish() == 0, calm.output
    assert site.digest(job, last) == site.digest(f"{job}-not", last)
