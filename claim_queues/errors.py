"""What can go wrong. Every message says what was tried, where, and what to do next; the SDK's error is the cause."""

from collections.abc import Sequence
from typing import ClassVar


class QueuesError(Exception):
    """Everything that this package raises on purpose. exit_code: what a command ends with."""

    exit_code: ClassVar[int] = 1


class ConfigError(QueuesError):
    """A bad URL, option or value."""

    exit_code = 2


class CredentialsError(ConfigError):
    """There are no credentials, or they are refused."""

    exit_code = 4


class StoreError(QueuesError):
    """A local file is damaged, foreign, full, removed or read-only; it was left as it is."""

    exit_code = 5


class QueueError(QueuesError):
    """The queue service refused or failed."""


class QueueUnavailable(QueueError):
    """The same call may succeed later. retry_after: seconds that the service asks us to wait, 0 for none."""

    def __init__(self, message: str, *, retry_after: float = 0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class AnswerLost(QueueUnavailable):
    """There is no answer, though the service may have done what it was asked for."""


class QueueNotFound(QueueError):
    """The queue does not exist: create it."""


class QueueForbidden(QueueError):
    """These credentials may not do that."""

    exit_code = 4


class MessageRefused(QueueError):
    """The service will never accept the body."""


class PostIncomplete(QueueError):
    """A post ended half way.

    accepted: message ids by the body's index in the call. refused: reasons, by index, of bodies that are not stored.
    unknown: indexes of bodies that may be stored or not, because the answer was lost.
    """

    exit_code = 6

    def __init__(
        self, message: str, *, accepted: dict[int, str], refused: dict[int, str], unknown: Sequence[int]
    ) -> None:
        super().__init__(message)
        self.accepted = accepted
        self.refused = refused
        self.unknown = tuple(unknown)


class ClaimLost(QueueError):
    """The claim expired, or was released: settle nothing."""
