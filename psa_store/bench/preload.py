"""What the fork server of the benchmark imports once, so that its children need not: torch alone takes two seconds."""

import psa_store.bench.driver  # noqa: F401
