"""The contract that every queue service fulfils, in the words of OpenStack's claims.

A *claim* hides a batch of messages from other consumers for its claim TTL. Its holder renews it while work goes on,
settles each message (posts the outcome, then deletes it) and releases the rest. A claim that is neither renewed nor
released expires, and its messages are free again: delivery is at least once.
"""

import ipaddress
import json
import math
import re
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, Self

from .errors import ConfigError, MessageRefused

JSON = Any
"""A JSON value: dict with str keys, list, str, int, float, bool or None."""
CLAIM_MARGIN_S = 2.0
"""Services round a claim's expiry down to whole seconds: a claim is trusted for this much less than its TTL."""


class Message(NamedTuple):
    """One message as it was claimed or browsed."""

    id: str  # opaque, unique, the same at every receive
    body: JSON  # the raw text where it is not JSON
    age: float  # seconds since it was posted
    receive_count: int | None = None  # this time included, as the service says; None where it does not count
    handle: str = ""  # for the service alone


@dataclass(slots=True)
class Claim:
    """Messages that are ours until `expires_at`. Those that were settled or could not be renewed have left it."""

    id: str
    queue: str
    ttl: int  # seconds, as asked for; each renewal asks for ttl and grace again
    grace: int
    messages: tuple[Message, ...]
    expires_at: float  # monotonic seconds; 0: it is lost
    posted: set[tuple[str, int]] = field(default_factory=set)  # message id and place of each outcome stored so far
    deleted: set[str] = field(default_factory=set)  # ids deleted before an error, to be reported by the next settle

    def holds(self, seconds: float) -> bool:
        """Whether the claim surely lasts that much longer."""
        return self.expires_at - time.monotonic() >= seconds

    def drop(self, ids: Collection[str]) -> None:
        """Take these messages out of the claim."""
        self.messages = tuple(message for message in self.messages if message.id not in ids)


class Post(NamedTuple):
    """A body for a queue."""

    queue: str
    body: JSON
    ttl: int | None = None  # seconds that it may wait; None: the service's longest


class Settlement(NamedTuple):
    """What to post for a message before it is deleted.

    fenced: delete it only while the claim still holds it. If False, a bulk delete may ignore claims: safe only where a
    second holder would come to the same outcome.
    """

    message: Message
    posts: tuple[Post, ...] = ()
    fenced: bool = True


class Settled(NamedTuple):
    """Ids of the messages that were deleted, and the error of each whose posts the service will never accept.

    A message in neither was lost: the claim did not hold it any more, and it was not deleted.
    """

    deleted: frozenset[str]
    refused: dict[str, MessageRefused]


class Stats(NamedTuple):
    """Numbers of messages in a queue, and the oldest one's age in seconds: None where it is empty or unknown."""

    free: int
    claimed: int
    delayed: int
    oldest_age: float | None = None

    @property
    def total(self) -> int:
        return self.free + self.claimed + self.delayed


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a service offers; callers ask this, never which service it is."""

    service: str  # its name, for people
    claim_limit: int  # most messages of a claim
    post_limit: int  # most bodies of a post
    message_bytes: int = 262_144  # most bytes of a body as the service counts them
    has_grace: bool = True  # a claim extends a message's life
    has_message_ttl: bool = True  # each message may have a TTL of its own
    can_browse: bool = True  # shows messages without claiming them
    release_delay: int = 0  # most seconds that a released message can be kept away; 0: it is free at once
    approximate_s: float = 0  # how long stats must read empty before that is believed
    makes_queues: bool = False  # at their first use; nobody has to create them
    utf8: bool = False  # counts characters as UTF-8 rather than as JSON's ASCII escapes

    def encode(self, body: JSON) -> str:
        """The body as JSON text; raises MessageRefused where no queue of the service would ever accept it."""
        try:
            text = json.dumps(body, allow_nan=False, ensure_ascii=not self.utf8, separators=(",", ":"))
        except (TypeError, ValueError, RecursionError) as error:
            raise MessageRefused(f"the body is not JSON: {error}") from error
        encoded = text.encode("utf-8", "backslashreplace")  # which writes a lone surrogate as JSON's escape
        if len(encoded) > self.message_bytes:
            raise MessageRefused(f"the body has {len(encoded):,} bytes; {self.service} accepts {self.message_bytes:,}")
        return encoded.decode()


class Queues(Protocol):
    """The queues of one service; one object serves all threads of a process.

    Every operation raises QueueUnavailable when the service does not answer now, QueueNotFound for a missing queue,
    QueueForbidden or CredentialsError when it refuses the caller, and ConfigError for values that it refuses.

    address: names the service and the account or file, without secrets, the same in all processes that share it.
    credentials: where they were found, for people.
    """

    limits: Limits
    address: str
    credentials: str = "none are needed"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """The service that the URL names."""

    def create(self, queue: str) -> None:
        """Create the queue; an existing one stays as it is."""

    def exists(self, queue: str) -> bool:
        """Whether the queue is there."""

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        """Store 1 to limits.post_limit bodies in order; return their message ids once they are durable.

        ttl: seconds that each may wait, 60 to 1,209,600; None: the service's longest.
        Raises MessageRefused where none was stored because one never can be, PostIncomplete where some were stored,
        or may have been.
        """

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """Claim up to `limit` free messages, oldest first; None when there is none within `wait` seconds.

        ttl, grace: 60 to 43,200 seconds. A message that would expire during the claim lives on until `grace` seconds
        after it. limit: 1 to limits.claim_limit.
        """

    def renew(self, claim: Claim) -> None:
        """Hold the claim for its TTL from now. Raises ClaimLost when none of its messages is held any more."""

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """Post each message's outcome, then delete it: a crash in between repeats a message, never loses one.

        May be called several times for one claim, each time with the messages that are ready, and again after
        QueueUnavailable. What it deletes leaves the claim.
        """

    def release(self, claim: Claim, *, delay: float = 0) -> None:
        """End the claim: what it still holds is free after `delay` seconds, at most limits.release_delay.

        To release a claim twice, or one that expired, is no error.
        """

    def browse(self, queue: str, *, after: str = "", limit: int = 20, wait: float = 0) -> tuple[list[Message], str]:
        """Messages behind the marker `after`, claimed and delayed ones too, and the next marker.

        Up to `limit` of them, fewer where the service's page is shorter; an empty list only where there is none within
        `wait` seconds. Raises ConfigError unless limits.can_browse.
        """

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        """Delete messages that no claim holds; others stay. Raises ConfigError unless limits.can_browse."""

    def purge(self, queue: str) -> None:
        """Delete all messages, claimed ones too."""

    def stats(self, queue: str) -> Stats:
        """Count the messages that can still be delivered. A failure raises; it never looks like an empty queue."""

    def stop_waiting(self) -> None:
        """End every wait, now and from now on; from any thread."""

    def close(self) -> None:
        """Free connections and files; no other call may follow."""

    def inspect(self, queue: str, *, is_posted_to: bool = False) -> list[str]:
        """Sentences about what may surprise users of the queue or service, such as a receive limit of its own.

        is_posted_to: outcomes are posted to it; else messages are claimed from it.
        """
        return []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def expiry(asked_at: float, ttl: int) -> float:
    """When a claim or renewal that was asked for at that monotonic time can no longer be trusted."""
    return asked_at + ttl - CLAIM_MARGIN_S


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):  # no service takes it back as JSON
        raise ValueError(text)
    return number


_DECODER = json.JSONDecoder(parse_float=_finite, parse_constant=int)  # int() refuses NaN, Infinity, -Infinity


def decode(text: str) -> JSON:
    """The JSON value of a stored body, or the text itself where it is not JSON; NaN and infinities are not."""
    try:
        return _DECODER.decode(text)
    except (ValueError, RecursionError):
        return text


def check_queue(name: str) -> str:
    """The name, where every service accepts it; else raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(f"queue {name!r}: use 1 to 64 letters, digits, '_' or '-'")
    return name


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address is this machine's own."""
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return host == "localhost"
