"""Rackspace Cloud Queues for the contract suite: a real Zaqar's API v1, signed in to through an identity double."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import queue_servers
from backends import Service, until_exit
from doubles.identity_double import IdentityDouble
from doubles.keyring_double import Keyring, keyring_of

CloudQueues = pytest.importorskip("claim_queues.cloud_queues").CloudQueues  # needs pyrax


@cache
def zaqar_url() -> str:
    """The root URL of this process's server."""
    return until_exit(partial(queue_servers.zaqar, 18, "mongodb"))


@contextmanager
def cloud_queues(directory: Path) -> Iterator[Service]:
    """Each object signs in for itself."""
    with (
        keyring_of(Keyring()),
        IdentityDouble(f"{zaqar_url()}/v1") as identity,
        Service(lambda: CloudQueues.from_url(identity.queue_url), partial(queue_servers.advance, zaqar_url())) as found,
    ):
        yield found
