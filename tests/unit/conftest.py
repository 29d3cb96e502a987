import time

import pytest


@pytest.fixture
def now(monkeypatch):
    """The monotonic clock: a list of one number, which a test moves."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock
