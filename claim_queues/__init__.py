"""Claim-based queues: one contract for an embedded SQLite file and the cloud services.

`open_queues` is the only place that lists the services; everything else asks the contract (`Queues`) and its
`Limits`.
"""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from .base import JSON, Claim, Limits, Message, Page, Post, Queues, Range, Settled, Settlement, Stats
from .errors import (
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueuesError,
    QueueUnavailable,
    StoreError,
)

__all__ = [
    "JSON",
    "Claim",
    "ClaimLost",
    "ConfigError",
    "CredentialsError",
    "Limits",
    "Message",
    "MessageRefused",
    "Page",
    "Post",
    "PostIncomplete",
    "QueueError",
    "QueueForbidden",
    "QueueNotFound",
    "QueueUnavailable",
    "Queues",
    "QueuesError",
    "Range",
    "Settled",
    "Settlement",
    "Stats",
    "StoreError",
    "open_queues",
]


def open_queues(url: str | None = None) -> Queues:
    """Open the queue service that the URL names; None is this user's own file of the embedded queue.

    `sqlite:///PATH` (relative to the working directory; four slashes for an absolute path),
    `rackspace://[USER@]REGION`, `zaqar://CLOUD` or `sqs://REGION`; each service's module says more.
    Raises ConfigError for a URL that names no service, StoreError for a file that cannot be used, CredentialsError
    where the service needs some and finds none.
    """
    scheme, _, rest = ("sqlite:" if url is None else url).partition(":")
    if url is None or scheme == "sqlite":
        from .sqlite import SqliteQueues
        from .store import state_path

        return SqliteQueues(state_path("queues.sqlite3") if url is None else _sqlite_path(rest))
    if scheme == "rackspace":
        from .cloud_queues import CloudQueues

        return CloudQueues.from_url(url)
    if scheme == "zaqar":
        try:
            from .zaqar import ZaqarQueues
        except ImportError as error:
            raise ConfigError(f"zaqar:// needs openstacksdk ({error}): see Credentials in docs/operating.md") from error

        return ZaqarQueues.from_url(url)
    if scheme == "sqs":
        from .sqs import SqsQueues

        return SqsQueues.from_url(url)
    raise ConfigError(
        "that is no queue URL: write sqlite:///PATH, rackspace://USER@REGION, zaqar://CLOUD or sqs://REGION"
    )


def _sqlite_path(rest: str) -> Path:
    parts = urlsplit(rest)
    path = unquote(parts.path).removeprefix("/")
    if not rest.startswith("///") or not path or parts.query or parts.fragment or "\0" in path:
        raise ConfigError(f"sqlite:{rest}: write sqlite:///PATH, or sqlite:////PATH for an absolute path")
    return Path(path).absolute()
