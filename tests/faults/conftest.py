"""The queue services with the scripts' own view of them, and logging as it was before a script in this process."""

import logging
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


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    names = (None, "urllib3", "botocore", "keystoneauth", "pyrax")
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
