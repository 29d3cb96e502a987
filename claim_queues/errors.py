"""The error tree. Every message says what was tried, where, and what to do next.

QueuesError                 never raised itself
├── ConfigError             a bad URL, option or value out of a service's limits        exit 2
│   └── CredentialsError    no credentials, or refused ones                             exit 4
├── StoreError              a local file is damaged, foreign, full or not writable      exit 5
└── QueueError              the service refused or failed; its own error is __cause__   exit 1
    ├── QueueUnavailable    network, throttling, a locked file: wait and try again
    ├── QueueNotFound       the queue does not exist: create it
    ├── QueueForbidden      these credentials may not do that
    ├── MessageRefused      a body that the service will never take
    ├── ClaimLost           lapsed or taken over: stop, settle nothing
    └── PostIncomplete      some bodies of a post were not accepted, or nobody knows    exit 6
"""

from collections.abc import Sequence
from typing import ClassVar


class QueuesError(Exception):
    """Root of everything that this package raises on purpose."""

    exit_code: ClassVar[int] = 1


class ConfigError(QueuesError):
    """The caller's values cannot work; nothing was sent."""

    exit_code = 2


class CredentialsError(ConfigError):
    """Credentials are missing or were refused; the message says where they were looked for."""

    exit_code = 4


class StoreError(QueuesError):
    """A local file cannot be used; it was left as it is."""

    exit_code = 5


class SyncFailed(StoreError):
    """What was just written is in the file and may be lost in a power cut; the file is not to be used further."""


class QueueError(QueuesError):
    """The queue service refused or failed; the service's own error is the cause."""


class QueueUnavailable(QueueError):
    """The service cannot be reached or asks for patience; the same call may succeed later.

    retry_after_s: the wait that the service asked for, in seconds, or None.
    """

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class AnswerLost(QueueUnavailable):
    """The request was sent, and nobody knows what the service did."""


class QueueNotFound(QueueError):
    """The queue does not exist."""


class QueueForbidden(QueueError):
    """The service knows the caller and says no."""


class MessageRefused(QueueError):
    """A body that is too large, or that the service cannot hold; trying again will not help."""


class ClaimLost(QueueError):
    """The claim lapsed or was taken over.

    ids: the messages that are lost; empty means all that the claim held.
    """

    def __init__(self, message: str, *, ids: frozenset[str] = frozenset()) -> None:
        super().__init__(message)
        self.ids = ids


class PostIncomplete(QueueError):
    """A post ended half way.

    accepted: ids of the accepted messages, by the body's index in the call.
    refused: the reason, by index, of bodies that are not on the queue.
    unknown: indexes of bodies whose fate nobody knows (the answer was lost).
    """

    exit_code = 6

    def __init__(
        self, message: str, *, accepted: dict[int, str], refused: dict[int, str], unknown: Sequence[int]
    ) -> None:
        super().__init__(message)
        self.accepted = accepted
        self.refused = refused
        self.unknown = tuple(unknown)
