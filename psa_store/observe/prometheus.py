"""A process's metrics as Prometheus reads them, with what its client library knows of any process."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from psa_store.observe.endpoint import Route
from psa_store.observe.metrics import METRICS, Kind, Metrics

_LABELS = ("job", "member", "role")


class _Collector(Collector):
    def __init__(self, job: str, metrics: Metrics) -> None:
        self._job = job
        self._metrics = metrics

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        """Every metric of this role. A gauge that was never set has no sample: it is not known."""
        values = self._metrics.read()
        labels = (self._job, self._metrics.member, self._metrics.role.value)
        for metric in METRICS:
            if self._metrics.role in metric.roles:
                family_of = CounterMetricFamily if metric.kind is Kind.COUNTER else GaugeMetricFamily
                family = family_of(f"psa_{metric.name}", metric.help, labels=_LABELS)
                if metric.name in values:
                    family.add_metric(labels, values[metric.name])
                yield family


def metrics_route(job: str, metrics: Metrics) -> Route:
    """A route that shows them as they are when it is asked."""
    registry = CollectorRegistry()
    registry.register(_Collector(job, metrics))
    ProcessCollector(registry=registry)
    return lambda: (200, CONTENT_TYPE_LATEST, generate_latest(registry))
