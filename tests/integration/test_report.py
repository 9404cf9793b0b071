"""`psa report` of real jobs, and its page in a real browser."""

from __future__ import annotations

import json
import os
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By

from psa_store.observe import EventKind, JobHistory
from psa_store.observe.report import write_report
from tests.harness import Site
from tests.integration.test_monitor import eventually, kinds_of, moved
from tests.integration.test_page import browser, complaints, needs_chromium
from tests.unit.test_report import EVIL, PNG, eventful

__all__ = ["browser"]  # a fixture

STEPS = 400


def psa(site: Site, *arguments: str) -> tuple[int, str]:
    run = site.psa(*arguments)
    return run.finish(), run.output


def report(site: Site, job: str, out: Path) -> dict[str, Any]:
    code, output = psa(site, "report", job, "--out", str(out), "--json")
    assert code == 0, output
    found: dict[str, Any] = json.loads(output)
    return found


def test_a_job_whose_server_and_worker_were_killed(site: Site, tmp_path: Path) -> None:
    job, calm = "reported", tmp_path / "calm"
    pace = ("--pace-s", "0.05", "--paced-until", str(calm))
    run = site.run(job, "--steps", str(STEPS), *pace, workers=2, servers=2, commit_every=10)
    with closing(JobHistory(job, site.redis, timeout_s=5.0)) as history:
        eventually(lambda: moved(history) and len(history.curve()) > 3)
        described = site.describe(job)
        server = next(each for each in described.servers if each.id != described.controller)
        os.kill(server.pid, signal.SIGKILL)
        eventually(lambda: "recovered" in kinds_of(history) and "hand-over" in kinds_of(history))
        points = len(history.curve())
        eventually(lambda: len(history.curve()) > points + 3)
        worker = site.describe(job).workers[0]
        os.kill(worker.pid, signal.SIGKILL)
        eventually(lambda: "worker-gone" in kinds_of(history))
        points = len(history.curve())
        eventually(lambda: len(history.curve()) > points + 3)

        running = report(site, job, tmp_path)
        assert not running["finished"] and len(running["failures"]) == 2
        calm.touch()
        assert run.finish() == 0, run.output

        found = report(site, job, tmp_path)
        assert [(each["what"], each["servers"], each["workers"]) for each in found["failures"]] == [
            ("server died", [server.id], []),
            ("worker died", [], [worker.id]),
        ], "each once; members that left at the end did not die"
        assert found["finished"] and found["version"] == STEPS
        assert found["failures"][0]["version"] % 10 == 0 and found["failures"][0]["computed_again"] <= 20
        assert all(each["pause_s"] is not None for each in found["failures"])
        assert 0.0 < found["goodput"] <= 1.0 and found["down_s"] + found["rest_s"] < found["running_s"]
        assert found["workers"][1] == found["servers"][1] == 2 and found["loss"] is not None
        assert found["samples"] > 0 and found["terms"] >= 2
        html, png = map(Path, found["files"])
        assert png.read_bytes().startswith(PNG) and server.id in html.read_text()

        back = min(site_versions(site, job))
        code, output = psa(site, "checkpoint", "rollback", job, str(back), "--yes")
        assert code == 0, output
        (told,) = [each for each in history.events() if each.kind is EventKind.ROLLBACK]
        assert told.version == back and told.text.startswith(f"the job was told to go back to version {back};")
    code, output = psa(site, "report", job, "--out", str(tmp_path))
    assert report(site, job, tmp_path)["down_s"] == 0.0, "a job that is told to go back after its end is at rest"
    assert code == 0 and f"{back:,} (not finished)" in output and "server died" in output
    assert output.endswith(f"{html}\n{png}")


def site_versions(site: Site, job: str) -> list[int]:
    code, output = psa(site, "checkpoint", "ls", job, "--json")
    assert code == 0, output
    versions: list[int] = json.loads(output)["versions"]
    return versions


def test_a_job_that_does_not_exist(site: Site, tmp_path: Path) -> None:
    code, output = psa(site, "report", "never", "--out", str(tmp_path / "out"))
    assert code == 2 and "no job 'never'" in output and "Traceback" not in output
    assert not (tmp_path / "out").exists()


def test_a_job_that_told_nothing(site: Site, tmp_path: Path) -> None:
    run = site.run("mute", "--steps", "10", workers=1, servers=1, env={"PSA_MONITOR": "0"})
    assert run.finish() == 0, run.output
    code, output = psa(site, "report", "mute", "--out", str(tmp_path / "out"))
    assert code == 2 and "job 'mute' has no history" in output and "PSA_MONITOR" in output
    assert not (tmp_path / "out").exists()


@needs_chromium
def test_the_page_needs_nothing_but_itself(browser: webdriver.Chrome, tmp_path: Path) -> None:
    html, _ = write_report(eventful(), tmp_path)
    for scheme, width in (("light", 1180), ("dark", 400)):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        metrics = {"width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        browser.get(html.as_uri())
        picture = browser.find_element(By.TAG_NAME, "img")
        assert browser.execute_script("return arguments[0].naturalWidth", picture) == 1200
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        browser.save_screenshot(str(tmp_path / f"{scheme}.png"))
    assert EVIL in browser.find_element(By.ID, "failures").text
    assert browser.find_element(By.ID, "checkpoints").text.count("<b>early</b>") == 1
    assert complaints(browser) == []
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {
        each["params"]["request"]["url"]
        for each in requests
        if each["method"] == "Network.requestWillBeSent" and each["params"]["documentURL"] == html.as_uri()
    }
    assert {url for url in urls if not url.startswith("data:")} == {html.as_uri()}
