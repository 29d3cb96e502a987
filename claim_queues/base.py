"""The contract: what every queue service offers, in the words of OpenStack's claims.

A *claim* holds a batch of messages for its claim TTL. Its holder settles each message (posts what became of
it, then deletes it), renews the claim while work goes on, or releases what it will not settle; what is
neither settled nor renewed becomes free again when the claim TTL ends. Messages are delivered at least once.
"""

import email.utils
import json
import math
import re
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import UTC
from typing import Any, NamedTuple, Self

from .errors import ConfigError, MessageRefused, QueueUnavailable

LONGEST_RETRY_AFTER_S = 3_600.0

JSON = Any
"""A JSON value: dict with str keys, list, str, int, float, bool or None."""

_LARGE_INTEGER = re.compile("[0-9]{19}")
"""An integer of fewer digits always fits into signed 64 bits, as Zaqar demands (HTTP 400 otherwise)."""


class Message(NamedTuple):
    """One message as it was when it was claimed or browsed.

    id: opaque and unique; the same at every receive.
    body: a JSON value, or the raw text where the body is not JSON.
    age: seconds since it was posted. ttl: its whole life in seconds, None when it never expires.
    receive_count: how often it was claimed, this time included; None where the service does not count.
    handle: what the service itself needs to settle it; not for callers.
    """

    id: str
    body: JSON
    age: float
    ttl: int | None
    receive_count: int | None = None
    handle: str = ""


class Outgoing(NamedTuple):
    """A post of a settlement, as services keep it that post first and delete later. place: among its message's posts.

    text: the document or body as it is sent.
    """

    message_id: str
    place: int
    queue: str
    text: str


@dataclass(frozen=True, slots=True)
class Claim:
    """A batch of messages held by one claim. grace: as it was asked for, in seconds; renewals repeat it.

    posted: for the service itself; what is stored already is not posted again when a settle is repeated after an error.
    """

    id: str
    queue: str
    messages: tuple[Message, ...]
    grace: int
    posted: set[Outgoing] = field(default_factory=set, compare=False, repr=False, kw_only=True)


class Post(NamedTuple):
    """A body for a queue. ttl: seconds; None is the longest that the service offers."""

    queue: str
    body: JSON
    ttl: int | None = None


class Settlement(NamedTuple):
    """The end of one message: what to post first, then its delete.

    fenced: delete only while the claim still holds the message. False lets a service delete in bulk without
    looking at claims; right only where a second holder would come to the very same outcome.
    """

    message: Message
    posts: tuple[Post, ...] = ()
    fenced: bool = True


@dataclass(frozen=True, slots=True)
class Settled:
    """What a settle did. Ids of messages, each in one of the three.

    deleted: their posts are stored and they are gone.
    lost: the claim no longer held them; another holder will settle them.
    refused: their posts will never be accepted; they are still held and were not deleted.
    """

    deleted: frozenset[str]
    lost: frozenset[str] = frozenset()
    refused: dict[str, MessageRefused] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Page:
    """Browsed messages in queue order, and the marker to go on behind them."""

    messages: tuple[Message, ...]
    marker: str


@dataclass(frozen=True, slots=True)
class Stats:
    """Numbers of messages in a queue, and the age in seconds of the oldest, None when it is empty or unknown."""

    free: int
    claimed: int
    delayed: int
    oldest_age: float | None

    @property
    def total(self) -> int:
        return self.free + self.claimed + self.delayed


@dataclass(frozen=True, slots=True)
class Range:
    """Whole numbers from low to high, both included."""

    low: int
    high: int

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and self.low <= value <= self.high

    def __str__(self) -> str:
        return f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Ranges and capabilities of one service. Callers ask these, never which service it is.

    service: its name, for people. Durations are seconds.
    grace: None where a claim does not extend a message's life.
    message_ttl: per message; None where the whole queue has one. keeps_for_ever: a post without TTL never expires.
    claim_limit: most messages a claim holds. post_batch: most bodies one request posts.
    message_bytes: most bytes of a body as JSON text.
    can_browse: looks without claiming. counts_receives: Message.receive_count is given.
    fenced_delete: a settle notices a lost claim. atomic_settle: posts and deletes are one transaction.
    releases_one_message: a claim can give back some of its messages. release_delay: longest delay, 0 for none.
    settle_linger: how long settlements may wait for company to share a request or transaction.
    stats_settle: how long stats must say empty before that can be believed; 0 where they are exact.
    """

    service: str
    claim_ttl: Range
    grace: Range | None
    message_ttl: Range | None
    keeps_for_ever: bool
    claim_limit: int
    post_batch: int
    message_bytes: int
    can_browse: bool
    counts_receives: bool
    fenced_delete: bool
    atomic_settle: bool
    releases_one_message: bool
    release_delay: int
    settle_linger: float
    stats_settle: float = 0

    def check_queue(self, name: str) -> None:
        """Raise ConfigError unless the name is 1 to 64 letters, digits, `_` or `-`, which every service takes."""
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
            raise ConfigError(f"queue name {name!r}: use 1 to 64 letters, digits, '_' or '-'")

    def check_claim(self, *, ttl: int, grace: int, limit: int) -> None:
        """Raise ConfigError unless a claim with these values is possible."""
        self._check("claim TTL", ttl, self.claim_ttl, "seconds")
        if self.grace is not None:
            self._check("grace", grace, self.grace, "seconds")
        self._check("claim limit", limit, Range(1, self.claim_limit), "messages")

    def check_message_ttl(self, ttl: int | None) -> None:
        """Raise ConfigError unless a message can live for ttl seconds."""
        if ttl is not None and self.message_ttl is not None:
            self._check("message TTL", ttl, self.message_ttl, "seconds")

    def check_release(self, *, delay: float) -> None:
        """Raise ConfigError unless a release can be delayed by that many seconds."""
        if not 0 <= delay <= self.release_delay:
            raise ConfigError(f"release delay {delay}: {self.service} takes 0 to {self.release_delay:,} seconds")

    def encode(self, body: JSON) -> str:
        """The body as JSON text (ASCII); raise MessageRefused where no queue would take it.

        NaN, infinities, integers outside signed 64 bits and bodies over message_bytes are refused.
        """
        try:
            text = _ENCODE(body)
        except (TypeError, ValueError, RecursionError) as error:
            raise MessageRefused(f"the body is not JSON: {error}") from error
        if len(text) > self.message_bytes:
            raise MessageRefused(f"the body has {len(text):,} bytes; {self.service} takes {self.message_bytes:,}")
        if _LARGE_INTEGER.search(text) and decode(text) is text:
            raise MessageRefused("the body holds an integer outside signed 64 bits")
        return text

    def _check(self, what: str, value: int, allowed: Range, unit: str) -> None:
        if value not in allowed:
            raise ConfigError(f"{what} {value}: {self.service} takes {allowed} {unit}")


class Queues(ABC):
    """The queues of one service. Thread-safe: one object serves a whole process.

    Every operation raises QueueUnavailable when the service cannot answer now, StoreError when a local file
    cannot be used, and ConfigError for values outside `limits` before anything is sent.

    address: names the service and the account or file, without secrets, alike in all processes that share it.
    requests: how many were sent, by what they asked for; none by the embedded queue. Only to be looked at: threads may
    lose one of each other's counts.
    """

    limits: Limits
    address: str
    requests: Counter[str]

    @abstractmethod
    def create(self, queue: str) -> None:
        """Make the queue; one that exists stays as it is."""

    @abstractmethod
    def exists(self, queue: str) -> bool:
        """Say whether the queue can be used without create()."""

    @abstractmethod
    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        """Store the bodies, in order, and return their message ids once they are durable.

        ttl: seconds each may live; None is the longest that the service offers.
        Raises MessageRefused when none was stored because one can never be, PostIncomplete when a post of
        several requests ended half way, QueueNotFound where the queue must be created first.
        """

    @abstractmethod
    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """Take up to `limit` free messages, oldest first, for `ttl` seconds; None when there is none.

        grace: a message that would expire before the claim ends lives on until `grace` seconds after it.
        wait: seconds to wait for the first message, in the cheapest way the service has.
        """

    @abstractmethod
    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        """Hold on for `ttl` seconds from now. messages: those still open (default: all of the claim).

        Raises ClaimLost when the claim lapsed or was released.
        """

    @abstractmethod
    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """Post what became of each message, then delete it; a crash in between repeats, never loses.

        One transaction where limits.atomic_settle: then nothing is posted for a message that is lost.
        After QueueUnavailable the same call may be repeated: a post may then be stored twice.
        """

    def settle_and_claim(
        self, claim: Claim, settlements: Sequence[Settlement], *, ttl: int, grace: int, limit: int
    ) -> tuple[Settled, Claim | None]:
        """Settle as settle() does, then claim from the same queue as claim() does, for who does both by turns.

        Where limits.atomic_settle this may be one transaction. A service that settles and does not answer the claim
        gives None for it, as an empty queue does: the next claim() says more.
        """
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        return self.settle(claim, settlements), self._claim_if_it_answers(claim.queue, ttl, grace, limit)

    def _claim_if_it_answers(self, queue: str, ttl: int, grace: int, limit: int) -> Claim | None:
        try:
            return self.claim(queue, ttl=ttl, grace=grace, limit=limit)
        except QueueUnavailable:
            return None

    @abstractmethod
    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        """Give messages back (default: all), claimable at once, or after `delay` seconds, at their old place.

        A message that would expire before the delay ends lives on until the claim's grace after it.
        What the claim no longer holds is left alone: releasing twice, or too late, is no error.
        Raises ConfigError for some of a claim's messages where not limits.releases_one_message.
        """

    @abstractmethod
    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        """Look at up to `limit` messages behind the marker `after` without claiming; changes nothing.

        claimed: show also those that a claim holds or that are delayed. wait: seconds to wait for a first one.
        Raises ConfigError where not limits.can_browse.
        """

    @abstractmethod
    def end_marker(self, queue: str) -> str:
        """The marker behind the newest message: what is posted from now on comes after it.

        Raises ConfigError where not limits.can_browse.
        """

    @abstractmethod
    def delete(self, queue: str, ids: Sequence[str]) -> None:
        """Remove messages that no claim holds; a claimed or unknown one is left alone.

        Raises ConfigError where not limits.can_browse.
        """

    @abstractmethod
    def purge(self, queue: str) -> None:
        """Remove all messages of the queue, claimed ones too."""

    @abstractmethod
    def stats(self, queue: str) -> Stats:
        """Count the messages that can still be delivered. A failure raises; it never looks like empty."""

    def inspect(self, queue: str) -> list[str]:
        """Look for what would surprise its users, such as a receive limit of the service's own; in words, one each.

        Raises StoreError where a file proves damaged.
        """
        return []

    @property
    def credentials(self) -> str:
        """Where they were found, for people; never what they are."""
        return "none are needed"

    def clock_ahead(self, queue: str) -> float | None:
        """Seconds by which this machine's clock is ahead of the service's; None where the service does not tell."""
        return None

    @abstractmethod
    def stop_waiting(self) -> None:
        """End every wait of this object, present and future; callable from any thread."""

    @abstractmethod
    def close(self) -> None:
        """Free connections and files; no other call may follow."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def decode(text: str) -> JSON:
    """The JSON value of a stored body, or the text itself where it is no JSON that could be posted again.

    NaN, infinities and integers outside signed 64 bits could not.
    """
    inner = text.strip(" \t\n\r")
    try:
        value, end = _DECODE(inner)
    except (ValueError, RecursionError):
        return text
    return value if end == len(inner) else text


def ahead_of(date: str | None) -> float | None:
    """Seconds by which this machine's clock is ahead of an HTTP date; None where that is none."""
    try:
        moment = email.utils.parsedate_to_datetime(date or "")
        if moment.tzinfo is None:  # the old forms of an HTTP date name no zone
            moment = moment.replace(tzinfo=UTC)
        return time.time() - moment.timestamp()
    except (ValueError, OverflowError):
        return None


def parse_retry_after(value: str | None) -> float | None:
    """Seconds that a Retry-After header asks for (whole seconds or an HTTP date), at most 3,600; None for nonsense."""
    if value and re.fullmatch(r"[0-9]{1,10}", value):
        return min(float(value), LONGEST_RETRY_AFTER_S)
    ahead_s = ahead_of(value)
    return None if ahead_s is None else min(max(0.0, -ahead_s), LONGEST_RETRY_AFTER_S)


def _refuse(number: str) -> None:
    raise ValueError(f"{number} cannot be posted")


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        _refuse(number)
    return value


def _small(number: str) -> int:
    if not -(2**63) <= (value := int(number)) < 2**63:
        _refuse(number)
    return value


_ENCODE = json.JSONEncoder(allow_nan=False, separators=(",", ":")).encode
_DECODE = json.JSONDecoder(parse_constant=_refuse, parse_float=_finite, parse_int=_small).raw_decode
