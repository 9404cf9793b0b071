"""Settings, and where the private servers of this machine are if the settings do not say where Redis is."""

from psa_store.config.key import check_bind, cluster_key
from psa_store.config.private_servers import fill_addresses, running
from psa_store.config.settings import (
    DEFAULT,
    FILE,
    FILE_VARIABLE,
    FOR_PEOPLE,
    Settings,
    as_environment,
    check_environment,
    load_settings,
    origins,
    variable_of,
    with_flags,
)

__all__ = [
    "DEFAULT",
    "FILE",
    "FILE_VARIABLE",
    "FOR_PEOPLE",
    "Settings",
    "as_environment",
    "check_bind",
    "check_environment",
    "cluster_key",
    "fill_addresses",
    "load_settings",
    "origins",
    "running",
    "variable_of",
    "with_flags",
]
