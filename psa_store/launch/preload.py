"""What the fork server imports once, so that a restarted process does not: torch alone takes two seconds.

Also what would be imported at its first use, which may be when the script's folder is searched before others.
"""

import structlog  # noqa: F401

import psa_store.launch.run
import psa_store.server
import psa_store.worker  # noqa: F401
