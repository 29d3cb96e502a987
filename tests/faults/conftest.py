"""The queue services with the scripts' own view of them."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from service_scripts import SERVICES, Service, parameters


@pytest.fixture(params=parameters(*SERVICES))
def service(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """A service whose queues are not made yet; its settings are also those of this process."""
    with SERVICES[request.param](tmp_path) as service:
        for name, value in service.env.items():
            if name != "PYTHONPATH":
                monkeypatch.setenv(name, value)
        yield service
