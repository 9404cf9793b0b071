"""Versioned shards in Redis. The only room that knows redis-py."""

from psa_store.storage.commit import ShardState
from psa_store.storage.connection import known_redis
from psa_store.storage.examination import PROBE_BYTES, RedisFacts, RedisRates, examine_redis, measure_redis
from psa_store.storage.head import CHUNK_BYTES, Head, Manifest, Section, newest_term
from psa_store.storage.history import History
from psa_store.storage.redis_store import RedisStore

__all__ = [
    "CHUNK_BYTES",
    "PROBE_BYTES",
    "Head",
    "History",
    "Manifest",
    "RedisFacts",
    "RedisRates",
    "RedisStore",
    "Section",
    "ShardState",
    "examine_redis",
    "known_redis",
    "measure_redis",
    "newest_term",
]
