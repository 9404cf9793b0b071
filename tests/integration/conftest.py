"""What tests of a worker in this process have in common: the site's environment, and a job with servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.harness import Servers, Site


@pytest.fixture
def environment(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `psa up` prints it."""
    for name, value in site.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def job(site: Site, environment: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a job that servers wait for: as many as the parameter or the module's ``SERVERS`` says, else one."""
    name = "".join(c if c.isalnum() else "-" for c in f"{request.path.stem}-{request.node.name}")
    servers = Servers(site, name, getattr(request, "param", getattr(request.module, "SERVERS", 1)))
    yield name
    servers.stop()
