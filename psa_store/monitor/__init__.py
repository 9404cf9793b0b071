"""What a process tells about itself while it runs: pulses, events and the curve in Redis, and a small HTTP endpoint.

Nothing here is needed for training, and nothing here may disturb it: one thread of its own, connections of its own, and
what cannot be told in time is not told.
"""

from psa_store.monitor.endpoint import Endpoint, Route
from psa_store.monitor.events import EventKind, Events, Note, versions_again
from psa_store.monitor.monitor import Monitor
from psa_store.monitor.page import Page
from psa_store.monitor.subject import Subject

__all__ = ["Endpoint", "EventKind", "Events", "Monitor", "Note", "Page", "Route", "Subject", "versions_again"]
