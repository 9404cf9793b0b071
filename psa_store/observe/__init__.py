"""What a process tells about itself while it runs: heartbeats, events and the curve in Redis, and a small HTTP
endpoint.

Nothing here is needed for training, and nothing here may disturb it: one thread of its own, connections of its own, and
what cannot be told in time is not told.
"""

from psa_store.observe.endpoint import Endpoint, Route
from psa_store.observe.events import EventKind, Events, Note, versions_again
from psa_store.observe.health import Health
from psa_store.observe.monitor import Monitor
from psa_store.observe.page.page import Page

__all__ = ["Endpoint", "EventKind", "Events", "Health", "Monitor", "Note", "Page", "Route", "versions_again"]
