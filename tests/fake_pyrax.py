"""Doubles of pyrax's queue classes, shaped by the real ones: a call that pyrax would not take fails here too.

They answer as pyrax 1.10.0 does, odd answers included:
- nothing to claim is None;
- a list of a queue that is missing (404) is [], as that of an empty one;
- a posted message knows no id, only the path in `resources`;
- an expired token is renewed inside the client, so that callers see 401 only when that failed too;
- errors are ClientException or a subclass by the status, with `code`; NotFound by name has its text for a code.
"""

import warnings
from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock, create_autospec

import pytest

with warnings.catch_warnings():  # pyrax's dependencies warn when they are imported
    warnings.simplefilter("ignore")
    from pyrax import exceptions, queueing


def client_error(status: int, message: str = "refused") -> exceptions.ClientException:
    """The error that pyrax makes of an HTTP status."""
    response = Mock(status_code=status, headers={})
    return exceptions.from_response(response, {"title": message})


def no_such_queue(name: str) -> exceptions.NotFound:
    """The error of each call by name of a missing queue: its code is the text."""
    return exceptions.NotFound(f"The queue '{name}' does not exist.")


def message(id_: str, body: Any, *, ttl: int = 3600, age: int = 0, claim_id: str | None = None) -> Mock:
    """A message as it is listed, or as a claim holds it."""
    double = create_autospec(queueing.QueueMessage, instance=True)
    query = f"?claim_id={claim_id}" if claim_id else ""
    double.href = f"/v1/queues/requests/messages/{id_}{query}"
    double.id, double.body, double.ttl, double.age, double.claim_id = id_, body, ttl, age, claim_id
    return double


def posted(*ids: str) -> Mock:
    """The answer to a post."""
    double = create_autospec(queueing.QueueMessage, instance=True)
    double.id = None
    double.resources = [f"/v1/queues/requests/messages/{id_}" for id_ in ids]
    return double


def claim(id_: str, messages: Sequence[Mock]) -> Mock:
    """A claim that holds these messages."""
    double = create_autospec(queueing.QueueClaim, instance=True)
    double.id, double.href, double.messages = id_, f"/v1/queues/requests/claims/{id_}", list(messages)
    return double


@pytest.fixture
def pyrax_client() -> Mock:
    """A QueueClient on which every queue exists and is empty."""
    double = create_autospec(queueing.QueueClient, instance=True)
    double.queue_exists.return_value = True
    double.claim_messages.return_value = None
    double.list_messages.return_value = []
    double.get_stats.return_value = {"claimed": 0, "free": 0, "total": 0}
    return double


@pytest.fixture
def pyrax_queue() -> Mock:
    """A Queue that is empty."""
    double = create_autospec(queueing.Queue, instance=True)
    double.claim_messages.return_value = None
    double.list.return_value = []
    return double
