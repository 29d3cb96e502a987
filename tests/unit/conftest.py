"""A clock that a test moves, and the queue file of a user as queues of any kind."""

import time
from functools import partial

import pytest
from in_process import open_as
from support import REQUESTS

from claim_queues.cli import state_path
from claim_queues.sqlite import SqliteQueues


@pytest.fixture
def now(monkeypatch):
    """The monotonic clock: a list of one number, which a test moves."""
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


@pytest.fixture
def queues():
    """The queue file of this user, which commands take when they are told nothing."""
    with SqliteQueues(state_path("queues.sqlite3")) as found:
        found.create(REQUESTS)
        yield found


@pytest.fixture
def use(queues, monkeypatch):
    """Let commands open the queue file as another kind of queues, or with other limits."""
    return partial(open_as, monkeypatch)
