"""A process's vitals as Prometheus reads them, with what its client library tells of any process."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from psa_store.telemetry import VITALS, Kind, Vitals

_LABELS = ("job", "member", "role")


class _Collector(Collector):
    def __init__(self, job: str, vitals: Vitals) -> None:
        self._job = job
        self._vitals = vitals

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Every vital of this role. A gauge that was never set has no sample: it is not known."""
        values = self._vitals.read()
        labels = (self._job, self._vitals.member, self._vitals.role.value)
        for vital in VITALS:
            if self._vitals.role in vital.roles:
                family_of = CounterMetricFamily if vital.kind is Kind.COUNTER else GaugeMetricFamily
                family = family_of(f"psa_{vital.name}", vital.help, labels=_LABELS)
                if vital.name in values:
                    family.add_metric(labels, values[vital.name])
                yield family


def metrics_route(job: str, vitals: Vitals) -> Callable[[], tuple[int, str, bytes]]:
    """A route that shows them as they are when it is asked."""
    registry = CollectorRegistry()
    registry.register(_Collector(job, vitals))
    ProcessCollector(registry=registry)
    return lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry))
