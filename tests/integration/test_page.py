"""The web page, in a real browser, served by the real endpoint, over what a job has in Redis and ZooKeeper."""

from __future__ import annotations

import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from psa_store.cluster import Cell, Member, Plan, ProcessRole, Server
from psa_store.coordination import Coordination
from psa_store.job.config import JobConfig
from psa_store.job.document import to_fields, to_text
from psa_store.job.layout import Layout, TensorRole, TensorSpec, make_layout
from psa_store.observe import Endpoint, Event, EventKind, JobHistory, Page
from psa_store.observe.curve import Point
from psa_store.observe.heartbeat import Heartbeat
from psa_store.storage import RedisStore
from tests.harness import Site

WAIT_S = 120.0
EVIL = "<img src=x onerror=document.title='evil'>"

needs_chromium = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="no chromium, no chromedriver: deploy/install test installs both",
)


class Job:
    """A job without processes: what they would have written, written by the test."""

    def __init__(self, name: str, site: Site, stack: ExitStack, **facts: Any) -> None:
        self.name = name
        self.store = stack.enter_context(closing(site.store()))
        self.history = stack.enter_context(closing(JobHistory(name, site.redis, timeout_s=5.0)))
        self._zookeeper = site.zookeeper
        self._stack = stack
        self.layout: Layout = make_layout([TensorSpec(("weights",), (1 << 19,), "float32", TensorRole.TRAINED)])
        config = JobConfig(name, 2, 0, {"name": "sgd"}, self.layout.fingerprint, **facts)
        self.store.check()
        self.store.create_job(name, config.to_json(), self.layout.to_json())

    def join(self, kind: ProcessRole, member: Member) -> Coordination:
        coordination = Coordination(
            self._zookeeper, self.name, session_timeout_s=10.0, connect_timeout_s=10.0, wake=lambda: None
        )
        self._stack.callback(coordination.close)
        coordination.start()
        coordination.join(kind, member)
        if kind is ProcessRole.SERVER:
            coordination.campaign(member.id)
        return coordination

    def beat(self, member: str, role: ProcessRole, **others: Any) -> None:
        plain = {"time": time.time(), "host": "node-a", "pid": 4711, "resident_bytes": 250_000_000}
        self.history.beat(Heartbeat(member, role, **{**plain, **others}))  # type: ignore[arg-type]

    def work(self, loss: float, samples_per_s: float = 640.0, step: int = 120) -> None:
        """Heartbeats of two workers, of which the second is behind. They have one time: steps go on from there."""
        now_s = time.time()
        for worker, behind in (("w-one", 0), ("w-two", 7)):
            self.beat(
                worker,
                ProcessRole.WORKER,
                time=now_s,
                metrics={"step": step - behind, "loss": loss},
                steps_per_s=10.0,
                samples_per_s=samples_per_s,
                stage="computing",
            )


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1180,1500"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium is not None and driver is not None
    options.binary_location = chromium
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


def serve(site: Site, job: str, stack: ExitStack, *, governs: bool = True) -> str:
    page = stack.enter_context(closing(Page(job, site.settings, lambda: governs)))
    endpoint = stack.enter_context(closing(Endpoint("127.0.0.1", 0, page.routes())))
    return f"http://{endpoint.address}/"


def a_running_job(name: str, site: Site, stack: ExitStack) -> Job:
    """Two workers that are well, and a server that does not answer."""
    job = Job(name, site, stack)
    server = Member("s-one", "node-a/boot", 4711, "127.0.0.1:1")
    coordination = job.join(ProcessRole.SERVER, server)
    for worker in ("w-one", "w-two"):
        job.join(ProcessRole.WORKER, Member(worker, "node-a/boot", 4712))
    plan = Plan(
        3,
        1,
        100,
        (Server(server.id, server.address, "", server.host),),
        (0,) * len(job.layout.shards),
        ("w-one", "w-two"),
    )
    coordination.write_plan(plan, None)
    job.work(1.25)
    return job


def text_of(browser: webdriver.Chrome, name: str) -> str:
    return str(browser.find_element(By.ID, name).text)


def wait_for(browser: webdriver.Chrome, name: str, wanted: str) -> None:
    WebDriverWait(browser, WAIT_S, poll_frequency=0.1).until(
        lambda _: wanted in text_of(browser, name), f"{wanted!r} does not come in #{name}: {text_of(browser, name)!r}"
    )


def complaints(browser: webdriver.Chrome) -> list[str]:
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def asked(browser: webdriver.Chrome) -> set[str]:
    """Every URL that the page has asked for, its own included."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return {each["request"]["url"] for each in sent if each["documentURL"].startswith("http")}


def get(url: str) -> tuple[int, bytes]:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@needs_chromium
def test_the_page_shows_what_is_sick_first_and_follows_the_job(
    site: Site, stack: ExitStack, browser: webdriver.Chrome, tmp_path: Path
) -> None:
    job = a_running_job("paged", site, stack)
    for i in range(40):
        point = Point(time.time() - 40 + i, 100 + i, loss=3.0 - i / 20, samples_per_s=600.0 + i)
        job.store._client.xadd(f"psa:{{{job.name}}}:curve", {"json": to_text(point)})
    gone = f"worker {EVIL} is gone"
    job.history.add(Event(time.time() - 20, EventKind.WORKER_GONE, gone))
    url = serve(site, job.name, stack)
    browser.get(url)

    wait_for(browser, "findings", "server s-one does not answer")
    wait_for(browser, "findings", "ps -o pid,stat,etime,args -p 4711")
    wait_for(browser, "numbers", "1.2500\nloss")
    assert "1,280\nsamples/s" in text_of(browser, "numbers")
    assert text_of(browser, "job") == "paged"
    rows = [row.text for row in browser.find_elements(By.CSS_SELECTOR, "#workers tbody tr")]
    assert rows[0].split()[:4] == ["w-one", "node-a", "4712", "0"] and rows[1].split()[4:6] == ["113", "7"]
    places = {name: browser.find_element(By.ID, name).location["y"] for name in ("findings", "numbers", "servers")}
    assert places["findings"] < places["numbers"] < places["servers"]
    wait_for(browser, "events", gone)
    WebDriverWait(browser, WAIT_S).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#loss polyline"))
    WebDriverWait(browser, WAIT_S).until(lambda _: browser.find_elements(By.CSS_SELECTOR, "#rate .mark"))

    job.work(0.75)
    wait_for(browser, "numbers", "0.7500\nloss")
    wait_for(browser, "age", "live")
    assert browser.title == "(1) paged – psa" and not browser.find_elements(By.TAG_NAME, "img")
    assert complaints(browser) == []
    names = ("", "status.json", "curve.json", "events.json")
    assert {each for each in asked(browser) if not each.startswith("data:")} == {url + name for name in names}
    browser.save_screenshot(str(tmp_path / "page.png"))


@needs_chromium
def test_the_page_fits_a_telephone_and_an_empty_job(site: Site, stack: ExitStack, browser: webdriver.Chrome) -> None:
    job = Job("paged-empty", site, stack)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    )
    browser.get(serve(site, job.name, stack))
    wait_for(browser, "state", "at rest")
    wait_for(browser, "events", "no events yet")
    wait_for(browser, "loss", "no points yet")
    assert text_of(browser, "servers") == "no servers" and text_of(browser, "findings") == ""
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
    assert complaints(browser) == []


@needs_chromium
def test_the_page_shows_which_stages_a_worker_has_and_waits_for(
    site: Site, stack: ExitStack, browser: webdriver.Chrome
) -> None:
    job = Job("paged-stages", site, stack, stages=2, microbatches=4)
    coordination = job.join(ProcessRole.SERVER, Member("s-one", "node-a/boot", 4711, "127.0.0.1:1"))
    workers = {"w-one": (Cell(0, 0), Cell(1, 0)), "w-two": (Cell(0, 1), Cell(1, 1))}
    for worker in workers:
        job.join(ProcessRole.WORKER, Member(worker, "node-a/boot", 4712))
    server = Server("s-one", "127.0.0.1:1", "", "node-a/boot")
    cells = ("w-one", "w-one", "w-two", "w-two")
    plan = Plan(3, 1, 100, (server,), (0,) * len(job.layout.shards), cells, stages=2)
    coordination.write_plan(plan, None)
    how = {"stages": 2, "stage": "computing", "ranks": (0, 1)}
    waits = {**how, "cells": workers["w-one"], "stage": "waiting", "waits_for": (Cell(1, 1),), "waits_s": 2.5}
    job.beat("w-one", ProcessRole.WORKER, **waits)
    job.beat("w-two", ProcessRole.WORKER, **how, cells=workers["w-two"])
    browser.get(serve(site, job.name, stack))
    wait_for(browser, "workers", "waits for stage 1 of rank 1, 2.5 s")
    shown = text_of(browser, "workers")
    assert "stage 0 of ranks 0-1" in shown and "stage 1 of ranks 0-1" in shown and "computing" in shown
    assert "2 ranks, 2 stages, 4 micro-batches, " in text_of(browser, "facts")
    assert complaints(browser) == []


def test_other_servers_name_the_controller(site: Site, stack: ExitStack) -> None:
    job = Job("paged-elsewhere", site, stack)
    url = serve(site, job.name, stack, governs=False)
    assert get(url)[0] == 503
    job.beat("s-two", ProcessRole.SERVER, metrics={"controller": 1.0}, endpoint='"><script>alert(1)</script>:80')
    assert get(url)[0] == 503, "what is no address is no link"
    job.beat("s-two", ProcessRole.SERVER, metrics={"controller": 1.0}, endpoint="10.0.0.7:9400")
    status, body = get(url)
    assert status == 200 and b'<a href="http://10.0.0.7:9400/">' in body


def test_servers_of_a_job_serve_it(site: Site) -> None:
    """One of them shows the job, the other says which."""
    run = site.run("paged-real", "--steps", "100000", "--pace-s", "0.02", workers=1, servers=2)
    run.wait_for_step(3)
    deadline_s = time.monotonic() + WAIT_S
    while True:
        job = site.describe("paged-real")
        pages = {each.id: f"http://{each.endpoint}/" for each in job.servers if each.endpoint}
        homes = {member: get(url)[1] for member, url in pages.items()}
        governing = job.controller
        if (
            len(homes) == 2
            and governing is not None
            and b"<script>" in homes[governing]
            and all(b"<p>" in each for each in homes.values())
        ):
            others = [home for member, home in homes.items() if member != governing]
            if all(pages[governing].encode() in home for home in others):
                break
        assert time.monotonic() < deadline_s, homes
        run.wait_for_line(lambda _: True)
    assert b"sha256-" in homes[governing] and b"_HASH" not in homes[governing]
    status, body = get(pages[governing] + "status.json")
    assert status == 200 and json.loads(body)["controller"] == governing
    run.process.send_signal(signal.SIGTERM)
    run.finish()


def test_many_viewers_cost_one_look(site: Site, stack: ExitStack) -> None:
    job = Job("paged-often", site, stack)
    url = serve(site, job.name, stack)
    first = json.loads(get(url + "status.json")[1])
    began_s = time.monotonic()
    answers = [json.loads(get(url + "status.json")[1]) for _ in range(20)]
    looks = {each["time"] for each in (first, *answers)}
    assert len(looks) <= 1 + (time.monotonic() - began_s) // 1.0 + 1, looks


def test_numbers_that_json_does_not_know_are_null(site: Site, stack: ExitStack) -> None:
    job = Job("paged-nan", site, stack)
    url = serve(site, job.name, stack)
    strange = {"format": Point.FORMAT, "time": 1.0, "version": 1, "loss": float("nan")}
    job.store._client.xadd(f"psa:{{{job.name}}}:curve", {"json": json.dumps(strange)})
    status, body = get(url + "curve.json")
    assert status == 200 and b"NaN" not in body and json.loads(body) == [to_fields(Point(1.0, 1))]


def test_a_job_that_does_not_exist_is_not_found(site: Site, stack: ExitStack) -> None:
    with closing(RedisStore(site.redis, timeout_s=5.0)) as store:
        store.check()
    status, body = get(serve(site, "paged-never", stack) + "status.json")
    assert status == 404 and "no job" in json.loads(body)["problem"]
