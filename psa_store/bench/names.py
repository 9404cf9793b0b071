"""Names of contenders and limits, as they stand in tables, JSON and charts."""

PSA, PSA_TCP = "psa", "psa, TCP"
GLOO, FLOOR = "gloo all_reduce", "floor"
RPC, RPC_PIECES = "torch rpc server", "torch rpc, pieces"
RAY, RAY_FLAT = "ray server", "ray, zero copy"
COPY = "memcpy, one thread"
STREAM, STREAM_BOTH_WAYS = "loopback TCP, one way", "loopback TCP, both ways"
REDIS_SET, REDIS_GET = "Redis SET, 4 MiB values", "Redis GET, 4 MiB values"
