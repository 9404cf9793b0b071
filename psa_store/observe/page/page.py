"""The web page of a job: what `psa status` shows, live, in a browser. Read-only.

Any number of viewers costs one look at the job a second: an answer is kept that long, and a request that comes during
a look gets the answer before. Without requests there is no look. Only the controller's page shows the job; the others
link to it.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.resources import files

from psa_store.config import Settings
from psa_store.errors import PsaError, UnknownJob
from psa_store.job.document import to_fields
from psa_store.logs import escaped
from psa_store.observe.endpoint import Answer, Route
from psa_store.observe.heartbeat import Heartbeat
from psa_store.observe.history import JobHistory
from psa_store.observe.status import PATIENCE_S_MAX, Observer
from psa_store.storage import RedisStore

_HTML = "text/html; charset=utf-8"
_JSON = "application/json"
_LOOK_EVERY_S = 1.0
_CURVE_EVERY_S = 3.0
_PLACES = {"SCRIPT_HASH": r"<script>(.*)</script>", "STYLE_HASH": r"<style>(.*)</style>"}


class Page:
    """What the endpoint of one server answers for people. Thread-safe; closed once.

    Args:
        settings: with both addresses.
        governs: whether this server is the controller now; must not wait.
    """

    def __init__(self, job: str, settings: Settings, governs: Callable[[], bool]) -> None:
        assert settings.redis is not None
        patience_s = min(settings.connect_timeout_s, PATIENCE_S_MAX)
        self._job = job
        self._governs = governs
        self._html = _load()
        self._store = RedisStore(settings.redis, timeout_s=patience_s)
        self._history = JobHistory(job, settings.redis, timeout_s=patience_s)
        self._observer = Observer(job, settings, self._store)
        self._status = _Kept(lambda: to_fields(self._observer.look()), _LOOK_EVERY_S)
        self._events = _Kept(lambda: [to_fields(escaped(each)) for each in self._history.events()], _LOOK_EVERY_S)
        self._curve = _Kept(lambda: [to_fields(escaped(each)) for each in self._history.curve()], _CURVE_EVERY_S)

    def close(self) -> None:
        self._observer.close()
        self._history.close()
        self._store.close()

    def routes(self) -> Mapping[str, Route]:
        """By path, what answers there."""
        return {
            "/": self._home,
            "/status.json": self._status.answer,
            "/curve.json": self._curve.answer,
            "/events.json": self._events.answer,
        }

    def _home(self) -> Answer:
        if self._governs():
            return 200, _HTML, self._html
        try:
            heartbeats = self._history.heartbeats()
        except PsaError as error:
            return 503, _HTML, f"<p>This server is not the controller. {html.escape(escaped(str(error)))}".encode()
        address = _controller_address(heartbeats.values())
        if not address:
            return 503, _HTML, b"<p>This server is not the controller, and no other has published where its page is."
        link = f'<a href="http://{address}/">http://{address}/</a>'
        return 200, _HTML, f"<p>The controller shows job {html.escape(self._job)}: {link}".encode()


class _Kept:
    """The answer to a question, asked again on the first request after ``keep_s``."""

    def __init__(self, ask: Callable[[], object], keep_s: float) -> None:
        self._ask = ask
        self._keep_s = keep_s
        self._asking = threading.Lock()
        self._answer: Answer | None = None
        self._asked_s = -math.inf

    def answer(self) -> Answer:
        before = self._answer
        if not self._asking.acquire(blocking=before is None):
            assert before is not None
            return before
        try:
            if self._answer is None or time.monotonic() - self._asked_s > self._keep_s:
                self._asked_s = time.monotonic()
                self._answer = self._fresh()
            return self._answer
        finally:
            self._asking.release()

    def _fresh(self) -> Answer:
        try:
            status, document = 200, self._ask()
        except UnknownJob as error:
            status, document = 404, {"problem": escaped(str(error))}
        except PsaError as error:
            status, document = 503, {"problem": escaped(str(error))}
        return status, _JSON, json.dumps(document, allow_nan=False).encode()


def _controller_address(heartbeats: Iterable[Heartbeat | None]) -> str:
    """Where the newest heartbeat of a controller has its page; empty if none does."""
    found = [each for each in heartbeats if each is not None and each.metrics.get("controller") == 1]
    address = max(found, key=lambda each: each.time).endpoint if found else ""
    return address if re.fullmatch(r"[\w.\-\[\]:]+:\d+", address) else ""


def _load() -> bytes:
    """The page, which lets its own script and style work, and nothing else: their hashes stand in its policy."""
    page = (files("psa_store.observe.page") / "page.html").read_text()
    for place, pattern in _PLACES.items():
        found = re.search(pattern, page, re.DOTALL)
        assert found is not None, place
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        page = page.replace(place, f"sha256-{digest}", 1)
    return page.encode()
