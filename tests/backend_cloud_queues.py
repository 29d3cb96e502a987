"""Rackspace Cloud Queues for the contract suite: a real Zaqar's API v1, signed in to through an identity double."""

import atexit
import functools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from doubles.identity_double import REGION, IdentityDouble
from doubles.keyring_double import USER, Keyring, keyring_of
from queue_servers import advance, zaqar

from claim_queues import Queues

CloudQueues = pytest.importorskip("claim_queues.cloud_queues").CloudQueues  # needs pyrax


@functools.cache
def zaqar_url() -> str:
    """The root URL of a Zaqar that runs until the test process ends."""
    closing = ExitStack()
    atexit.register(closing.close)
    directory = Path(closing.enter_context(tempfile.TemporaryDirectory()))
    return closing.enter_context(zaqar(18, "mongodb", directory / "zaqar.log"))


class CloudQueuesService:
    """Cloud Queues behind that identity service; each object signs in for itself."""

    def __init__(self, identity_url: str, closing: ExitStack) -> None:
        self.url = f"rackspace://{USER}@{REGION}?identity={identity_url}"
        self._closing = closing
        self.queues = self.another()

    def another(self) -> Queues:
        return self._closing.enter_context(CloudQueues.from_url(self.url))

    def advance(self, seconds: float) -> None:
        advance(zaqar_url(), seconds)


@contextmanager
def cloud_queues(directory: Path) -> Iterator[CloudQueuesService]:
    with ExitStack() as closing:
        closing.enter_context(keyring_of(Keyring()))
        identity = closing.enter_context(IdentityDouble(f"{zaqar_url()}/v1"))
        yield CloudQueuesService(identity.v2, closing)
