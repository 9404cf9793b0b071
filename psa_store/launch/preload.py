"""What the fork server imports once, so that a restarted process does not: torch alone takes two seconds."""

import psa_store.launch.run
import psa_store.server
import psa_store.worker  # noqa: F401
