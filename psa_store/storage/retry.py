"""How long, and when, a call to Redis is tried again. The one policy of retries towards Redis.

Only what is idempotent may be called through it, because an answer may get lost: what each call relies on stands beside
it. redis-py's own retries are off (see ``connection.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import redis
import tenacity

_PAUSE_S = 0.05
_AWAY = (redis.exceptions.ConnectionError, redis.exceptions.BusyLoadingError)
T = TypeVar("T")


def retried(operation: Callable[[], T], timeout_s: float) -> T:
    """Try an idempotent operation again while Redis is away or loading, until ``timeout_s`` is over.

    Raises:
        redis.exceptions.RedisError: it is away still, it did not answer in time, or it refuses.
    """
    retrying = tenacity.Retrying(
        stop=tenacity.stop_after_delay(timeout_s),
        wait=tenacity.wait_fixed(_PAUSE_S),
        retry=tenacity.retry_if_exception_type(_AWAY)
        & tenacity.retry_if_not_exception_type(redis.exceptions.AuthenticationError),
        reraise=True,
    )
    return retrying(operation)
