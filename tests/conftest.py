"""For every test a clean environment, and logging as it was: no options, credentials, proxies or state of the user."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import widget_consumer


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("WIDGET_", "AWS_")) or name == "PYTHONUNBUFFERED" or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(autouse=True)
def tests_on_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that runs in the tests' own process would keep that, and all that it starts later, on one core."""
    monkeypatch.setattr(widget_consumer, "stay_on_one_core", lambda: None)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """As it was before a script ran in this process and set its own level."""
    names = (None, "urllib3", "botocore", "keystoneauth", "pyrax")
    root = logging.getLogger()
    handlers, levels = root.handlers[:], {name: logging.getLogger(name).level for name in names}
    yield
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
