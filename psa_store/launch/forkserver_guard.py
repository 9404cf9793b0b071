"""For the fork server alone, which imports it first: it ends with the supervisor, neither later nor earlier.

Not later: left to itself it notices the end of the supervisor by a pipe, whose other end its children inherit.

Not earlier: SIGTERM to a whole process group or control group (by a service manager, `timeout`, a shell) hits the fork
server too. If it ended then, the exit codes of its children would be lost, and the supervisor would take
those that are still leaving for dead, and stop Redis and ZooKeeper under them.
"""

from __future__ import annotations

import os
import signal

from psa_store import logs
from psa_store.launch.guard import SAFE_PATH, die_with_parent

# A supervisor that ended before this line has no children yet: then the pipe does end.
die_with_parent(signal.SIGKILL)
# Blocked, neither ignored nor handled: one that is sent to a child just forked waits until the child can take it.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
# It kept the current directory off our path while this process started: processes of the script decide for themselves.
if os.environ.get("PYTHONSAFEPATH") == SAFE_PATH:
    del os.environ["PYTHONSAFEPATH"]
logs.entitle("fork server")
