"""What a job will take, before it is started: bytes, memory of Redis, and time beside the computation."""

from psa_store.estimate.asking import ask_script
from psa_store.estimate.forecast import Forecast, Speeds, forecast
from psa_store.estimate.speeds import measure
from psa_store.estimate.traffic import Traffic, traffic_of

__all__ = ["Forecast", "Speeds", "Traffic", "ask_script", "forecast", "measure", "traffic_of"]
