"""Amazon SQS through boto3.

SQS knows no claims: each message is held for itself, by a receipt handle, and a claim here is what one receive
brought. Nor does it tell of a loss: it answers a visibility change by an expired handle with success and does nothing
(seen on AWS: localstack/localstack#9632), and a late delete "succeeds, but the message might not be deleted". So a
claim carries its own deadlines, from before the receive was asked for; what has passed them is lost. Numbers and
quotations without a source are from the SQS API reference and developer guide ("Amazon SQS message quotas").
"""

import hashlib
import math
import os
import random
import re
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, NamedTuple, NoReturn, Self
from urllib.parse import parse_qs, urlencode

import boto3.session
import botocore.exceptions as sdk
import botocore.session
from botocore.config import Config
from botocore.parsers import ResponseParserError

from .base import JSON, Claim, Limits, Message, Page, Queues, Range, Settled, Settlement, Stats, decode
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
)

LONGEST_RETENTION_S, USUAL_RETENTION_S = 1_209_600, 345_600
LONGEST_HOLD_S = 43_200
"""Since the receive, renewals and delays included; SQS refuses what would go beyond, and shortens nothing."""

LIMITS = Limits(
    service="Amazon SQS",
    claim_ttl=Range(1, LONGEST_HOLD_S),
    grace=None,
    message_ttl=None,
    keeps_for_ever=False,
    claim_limit=10,
    post_batch=10,
    # 1 MiB for a message and for the sum of a batch; 262,144 bytes before August 2025.
    message_bytes=1_048_576,
    can_browse=False,
    counts_receives=True,
    fenced_delete=False,
    atomic_settle=False,
    releases_one_message=True,
    release_delay=LONGEST_HOLD_S,
    settle_linger=0.1,
    stats_settle=60,
)

CONNECT_TIMEOUT_S, READ_TIMEOUT_S = 5, 30
POLL_S = 2
"""Longest single long poll (SQS takes 20 s), so that stop_waiting() ends a wait within so long and a round trip."""
CONNECTIONS = 32
"""Kept open, one for each thread that asks at the same time."""
ATTEMPTS = 2
RETRY_PAUSE_S = (0.05, 0.5)
READY_S = 1.0
"""A new queue can be used after so long (CreateQueue)."""
BUSY_S = {"PurgeQueueInProgress": 60.0, "QueueDeletedRecently": 60.0}

ENDPOINT = re.compile(
    r"(https://[a-z0-9.-]+|http://(localhost|127(\.\d{1,3}){3}|\[::1\]))(:\d{1,5})?(/[\w./-]*)?",
    re.ASCII | re.IGNORECASE,
)
"""Without a password, and over plain HTTP only to loopback."""
WRITE = "write sqs://REGION, with ?endpoint=URL for a local server and profile=NAME for one of your AWS profiles"
HOW_TO_LOG_IN = (
    "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (a local server takes any) or AWS_PROFILE, or write"
    " ~/.aws/credentials; AWS_EC2_METADATA_DISABLED=false takes those of the machine"
)

CODES: dict[str, type[QueuesError]] = {
    name: kind
    for kind, names in {
        QueueNotFound: "NonExistentQueue QueueDoesNotExist InvalidAddress",
        CredentialsError: "ExpiredToken IncompleteSignature InvalidClientTokenId InvalidSecurity InvalidSignature"
        " MissingAuthenticationToken OptInRequired RequestExpired SignatureDoesNotMatch UnrecognizedClient",
        QueueForbidden: "AccessDenied NotAuthorized KmsAccessDenied KmsDisabled KmsInvalidKeyUsage KmsInvalidState"
        " KmsNotFound KmsOptInRequired",
        QueueUnavailable: "InternalError InternalFailure KmsThrottled OverLimit PurgeQueueInProgress"
        " QueueDeletedRecently RequestAborted RequestThrottled RequestTimeout ServiceUnavailable Throttling",
        # InvalidParameterValue: a body longer than its queue's own MaximumMessageSize, or a hold beyond 12 h; the
        # rest was checked before.
        MessageRefused: "BatchRequestTooLong InvalidMessageContents InvalidParameterValue RequestEntityTooLarge",
        ClaimLost: "InvalidIdFormat MessageNotInflight ReceiptHandleIsInvalid",
    }.items()
    for name in names.split()
}
"""SQS's errors, without what stands before the last dot and without "Exception"; the others go by HTTP status."""
BY_STATUS = {401: CredentialsError, 403: QueueForbidden, 429: QueueUnavailable}

SDK_ERRORS = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, RuntimeError)


class AnswerLost(QueueUnavailable):
    """Nobody knows whether SQS did what it was asked."""


KINDS: tuple[tuple[tuple[type[Exception], ...], type[QueuesError]], ...] = (
    ((sdk.ConnectionError, sdk.MetadataRetrievalError), QueueUnavailable),  # nothing was sent
    ((sdk.HTTPClientError, sdk.IncompleteReadError, sdk.ChecksumError, ResponseParserError), AnswerLost),
    ((sdk.NoCredentialsError, sdk.PartialCredentialsError, sdk.CredentialRetrievalError), CredentialsError),
    ((sdk.UnknownCredentialError, sdk.ProfileNotFound, sdk.RefreshWithMFAUnsupportedError), CredentialsError),
    ((sdk.SSOError, sdk.LoginError, sdk.TokenRetrievalError, sdk.NoAuthTokenError), CredentialsError),
    ((RuntimeError,), CredentialsError),  # they are expired when they were just refreshed
    ((sdk.BotoCoreError,), ConfigError),
)
"""What the SDK itself raises; the first that fits counts."""


class Outcome(NamedTuple):
    """A post of a settlement. place: among the message's posts."""

    message_id: str
    place: int
    queue: str
    text: str


@dataclass(frozen=True, slots=True)
class SqsClaim(Claim):
    """A claim, and what SQS does not remember of it.

    asked_at: monotonic time before the receive. until: by message id, the monotonic time up to which it is surely ours.
    posted: stored, while the message may not be deleted yet: a repeated settle does not post them again.
    """

    asked_at: float
    until: dict[str, float] = field(compare=False)
    posted: set[Outcome] = field(default_factory=set, compare=False)
    deleted: set[str] = field(default_factory=set, compare=False)

    def holds(self, message: Message) -> bool:
        return time.monotonic() < self.until.get(message.id, -math.inf)


class SqsQueues(Queues):
    """The queues of a region, or of the local server at `endpoint`; boto3 looks for credentials as it always does.

    profile: name of an AWS profile, None for the usual one. ready_after: seconds before a new queue can be used.
    """

    limits = LIMITS

    def __init__(
        self, region: str, *, endpoint: str | None = None, profile: str | None = None, ready_after: float = READY_S
    ) -> None:
        if endpoint is not None:
            _check_endpoint(endpoint)
        given = {name: value for name, value in (("endpoint", endpoint), ("profile", profile)) if value}
        self.address = f"sqs://{region}" + (f"?{urlencode(given, safe=':/[]')}" if given else "")
        self._region, self._endpoint, self._profile = region, endpoint, profile
        self._ready_after = ready_after
        self._stopped = threading.Event()
        self._urls: dict[str, str] = {}
        self._retentions: dict[str, int] = {}
        self._client = self._connect()

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open sqs://REGION?endpoint=URL&profile=NAME; raises ConfigError or CredentialsError with what to write."""
        found = re.fullmatch(r"sqs://([a-z0-9-]+)/?(?:\?([^#]*))?", url)
        if not found:
            # Not repeated in the message: who gets it wrong may have written a key into it.
            raise ConfigError(f"this is no URL of Amazon SQS: {WRITE}")
        region, options = found[1], parse_qs(found[2] or "", keep_blank_values=True)
        if options.keys() - {"endpoint", "profile"} or any(len(v) > 1 or not v[0] for v in options.values()):
            raise ConfigError(f"sqs://{region}: takes endpoint and profile, each once: {WRITE}")
        endpoint, profile = (options.get(name, [None])[0] for name in ("endpoint", "profile"))
        return cls(region, endpoint=endpoint, profile=profile)

    def create(self, queue: str) -> None:
        """Make the queue if it is missing, with the longest retention (14 days): messages have no TTL of their own."""
        if self.exists(queue):
            return
        # The same values for every queue, so that two who create one at the same moment agree.
        values = {"MessageRetentionPeriod": LONGEST_RETENTION_S, "MaximumMessageSize": self.limits.message_bytes}
        self._call("create_queue", queue, QueueName=queue, Attributes={name: str(n) for name, n in values.items()})
        self._stopped.wait(self._ready_after)

    def exists(self, queue: str) -> bool:
        self.limits.check_queue(queue)
        try:
            self._look_up(queue)
        except QueueNotFound:
            return False
        return True

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        self._check_post(queue, ttl)
        texts = [self.limits.encode(body) for body in bodies]
        stored, failed = self._send(queue, texts)
        if not failed:
            return [stored[index] for index in range(len(texts))]
        unknown = [index for index, error in failed.items() if isinstance(error, AnswerLost)]
        error = min(failed.values(), key=lambda error: not isinstance(error, MessageRefused))
        if not stored and not unknown:
            raise error
        raise PostIncomplete(
            f"{len(stored)} of {len(texts)} bodies were accepted: {error}",
            accepted=stored,
            refused={index: str(error) for index, error in failed.items() if index not in unknown},
            unknown=unknown,
        ) from error

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """wait: rounded up to whole seconds; with 0 SQS asks only some of its servers and may overlook messages."""
        self.limits.check_queue(queue)
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        retention = self._retention(queue)  # first: if this fails, nothing was received and hidden
        give_up_at = time.monotonic() + wait
        while True:
            asked_at = time.monotonic()
            left = 0.0 if self._stopped.is_set() else give_up_at - asked_at
            seconds = max(0, min(POLL_S, math.ceil(left)))
            messages = self._receive(queue, ttl, limit, seconds, retention)
            if messages:
                until = dict.fromkeys((message.id for message in messages), asked_at + ttl)
                return SqsClaim(uuid.uuid4().hex, queue, messages, grace, asked_at, until)
            # A server that does not wait is not asked again and again.
            self._stopped.wait(max(0.0, asked_at + min(seconds, left) - time.monotonic()))
            if self._stopped.is_set() or time.monotonic() >= give_up_at:
                return None

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        """A message that would be held for more than 12 h since its receive counts as lost."""
        self.limits.check_claim(ttl=ttl, grace=claim.grace, limit=1)
        held, wanted = self._of(claim, messages)
        asked_at = time.monotonic()
        renewed, failed = self._hide(held, wanted, ttl)
        held.until.update(dict.fromkeys(renewed, asked_at + ttl))
        self._raise_unless_lost(failed)
        if lost := frozenset(message.id for message in wanted if message.id not in renewed):
            raise ClaimLost(f"claim {claim.id} on {claim.queue} holds {len(lost)} messages no longer", ids=lost)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """When it is repeated after an error, what was posted or deleted before stays so and is not asked for again."""
        held, _ = self._of(claim, ())
        outcomes, refused = self._outcomes(settlements)
        messages = {each.message.id: each.message for each in settlements if each.message.id in outcomes}
        ours = [message for message in messages.values() if held.holds(message)]
        failed = self._store(held, [outcome for message in ours for outcome in outcomes[message.id]])
        failed |= self._remove(held, [message for message in ours if message.id not in failed])
        refused |= {id_: error for id_, error in failed.items() if isinstance(error, MessageRefused)}
        self._raise_unless_lost({id_: error for id_, error in failed.items() if id_ not in refused})
        deleted = frozenset(messages.keys() & held.deleted)
        return Settled(deleted=deleted, lost=frozenset(messages.keys() - deleted - refused.keys()), refused=refused)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        """A delay ends 12 h after the receive at the latest."""
        self.limits.check_release(delay=delay)
        held, wanted = self._of(claim, messages)
        # A second less than SQS allows, for the request's own time.
        longest = LONGEST_HOLD_S - 1 - math.ceil(time.monotonic() - held.asked_at)
        released, failed = self._hide(held, wanted, max(0, min(math.ceil(delay), longest)))
        for message_id in released:
            held.until.pop(message_id, None)
        self._raise_unless_lost(failed)

    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        self._refuse("cannot show messages without claiming them")

    def end_marker(self, queue: str) -> str:
        self._refuse("cannot show messages without claiming them, so it has no markers")

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        self._refuse("deletes claimed messages only, never by id")

    def purge(self, queue: str) -> None:
        """Remove all messages, claimed ones too; it takes up to 60 s, and what is posted meanwhile may go as well."""
        self._ask("purge_queue", queue)

    def stats(self, queue: str) -> Stats:
        """The numbers are approximate; what was released with a delay counts as claimed."""
        names = [f"ApproximateNumberOfMessages{kind}" for kind in ("", "NotVisible", "Delayed")]
        found = self._attributes(queue, *names)
        with self._understanding(queue):
            free, claimed, delayed = (int(found[name]) for name in names)
        return Stats(free, claimed, delayed, None)

    def inspect(self, queue: str) -> list[str]:
        found = self._attributes(queue, "RedrivePolicy", "MessageRetentionPeriod", "DelaySeconds", "MaximumMessageSize")
        with self._understanding(queue):
            retention, delay = int(found["MessageRetentionPeriod"]), int(found.get("DelaySeconds", 0))
            largest = int(found.get("MaximumMessageSize", self.limits.message_bytes))
        warnings = {
            f"has a redrive policy ({found.get('RedrivePolicy')}): SQS itself moves away what is received so often,"
            " in an outage of the maker too; remove the policy": "RedrivePolicy" in found,
            f"keeps messages for {retention:,} s, claimed or not: raise its MessageRetentionPeriod (up to"
            f" {LONGEST_RETENTION_S:,})": retention < USUAL_RETENTION_S,
            f"hides each new message for {delay} s: set its DelaySeconds to 0": delay > 0,
            f"takes bodies up to {largest:,} bytes: raise its MaximumMessageSize": largest < self.limits.message_bytes,
        }
        return [f"queue {queue} {text}" for text, holds in warnings.items() if holds]

    def stop_waiting(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop_waiting()
        self._client.close()

    def _connect(self) -> Any:
        try:
            core = botocore.session.Session(profile=self._profile)
            if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() != "false":
                # Away from EC2 nothing answers there, and it is slow to notice.
                core.get_component("credential_provider").remove("iam-role")
            if core.get_credentials() is None:
                raise CredentialsError(f"{self.address}: no AWS credentials: {HOW_TO_LOG_IN}")
            session = boto3.session.Session(region_name=self._region, botocore_session=core)
            client = session.client("sqs", endpoint_url=self._endpoint, config=self._config())
        except SDK_ERRORS as error:
            raise self._problem(error, "connect to", "queues") from error
        except ValueError as error:
            raise ConfigError(f"{self.address}: the endpoint of your AWS settings is no URL") from error
        _check_endpoint(client.meta.endpoint_url)  # the user's AWS settings can name one too
        return client

    def _config(self) -> Config:
        return Config(
            connect_timeout=CONNECT_TIMEOUT_S,
            read_timeout=READ_TIMEOUT_S,
            max_pool_connections=CONNECTIONS,
            # Retried in _call instead, which knows whether an answer was lost.
            retries={"mode": "standard", "total_max_attempts": 1},
            # What goes over plain HTTP goes to loopback, not to a proxy.
            proxies={} if (self._endpoint or "").startswith("http:") else None,
        )

    def _receive(self, queue: str, ttl: int, limit: int, wait: int, retention: int) -> tuple[Message, ...]:
        answer = self._ask(
            "receive_message",
            queue,
            MaxNumberOfMessages=limit,
            VisibilityTimeout=ttl,
            WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        now = time.time()
        with self._understanding(queue):
            # By id: SQS may deliver a message twice, even at once, and the newest handle is the one to use.
            found = {entry["MessageId"]: _message(entry, retention, now) for entry in answer.get("Messages", ())}
        return tuple(found.values())

    def _outcomes(
        self, settlements: Sequence[Settlement]
    ) -> tuple[dict[str, list[Outcome]], dict[str, MessageRefused]]:
        outcomes: dict[str, list[Outcome]] = {}
        refused: dict[str, MessageRefused] = {}
        for settlement in settlements:
            id_ = settlement.message.id
            for post in settlement.posts:
                self._check_post(post.queue, post.ttl)
            try:
                outcomes[id_] = [
                    Outcome(id_, place, post.queue, self.limits.encode(post.body))
                    for place, post in enumerate(settlement.posts)
                ]
            except MessageRefused as error:
                refused[id_] = error
        return outcomes, refused

    def _store(self, held: SqsClaim, outcomes: Iterable[Outcome]) -> dict[str, QueuesError]:
        """Post what is not posted yet; gives the errors by message id, a refusal before any other."""
        by_queue: dict[str, list[Outcome]] = {}
        for outcome in outcomes:
            if outcome not in held.posted:
                by_queue.setdefault(outcome.queue, []).append(outcome)
        failed: dict[str, QueuesError] = {}
        for queue, wanted in by_queue.items():
            stored, errors = self._send(queue, [outcome.text for outcome in wanted])
            held.posted.update(wanted[index] for index in stored)
            for index, error in errors.items():
                if isinstance(error, MessageRefused) or wanted[index].message_id not in failed:
                    failed[wanted[index].message_id] = error
        return failed

    def _remove(self, held: SqsClaim, messages: Iterable[Message]) -> dict[str, QueuesError]:
        entries = {message.id: {"ReceiptHandle": message.handle} for message in messages}
        removed, failed = self._batches("delete_message_batch", held.queue, entries, ClaimLost)
        held.deleted.update(removed)
        for message_id in removed:
            held.until.pop(message_id, None)
        return failed

    def _hide(
        self, held: SqsClaim, messages: Iterable[Message], seconds: int
    ) -> tuple[Collection[str], dict[str, QueuesError]]:
        entries = {
            message.id: {"ReceiptHandle": message.handle, "VisibilityTimeout": seconds}
            for message in messages
            if held.holds(message)
        }
        hidden, failed = self._batches("change_message_visibility_batch", held.queue, entries, ClaimLost)
        return hidden.keys(), failed

    def _send(self, queue: str, texts: Sequence[str]) -> tuple[dict[int, str], dict[int, QueuesError]]:
        """Post the texts in order: the ids of those stored and the errors of the others, by index."""
        entries = {str(index): {"MessageBody": text} for index, text in enumerate(texts)}
        stored, failed = self._batches("send_message_batch", queue, entries, MessageRefused)
        return (
            {int(index): entry["MessageId"] for index, entry in stored.items()},
            {int(index): error for index, error in failed.items()},
        )

    def _batches(
        self, operation: str, queue: str, entries: Mapping[str, dict[str, Any]], refusal: type[QueueError]
    ) -> tuple[dict[str, Any], dict[str, QueuesError]]:
        """Ask in as few requests as SQS lets us: its answers, and the errors of the others, by entry id.

        refusal: what an entry's own failure means. Any other failure ends it: later entries are not asked for.
        """
        done: dict[str, Any] = {}
        failed: dict[str, QueuesError] = {}
        for batch in _split(entries, self.limits.message_bytes):
            obstacle = next((error for error in failed.values() if not isinstance(error, refusal)), None)
            if isinstance(obstacle, AnswerLost):
                obstacle = QueueUnavailable(f"not asked for, since {obstacle}")
            if obstacle:
                failed |= dict.fromkeys(batch, obstacle)
                continue
            answers, errors = self._batch(operation, queue, batch, refusal)
            done |= answers
            failed |= errors
        return done, failed

    def _batch(
        self, operation: str, queue: str, entries: dict[str, dict[str, Any]], refusal: type[QueueError]
    ) -> tuple[dict[str, Any], dict[str, QueuesError]]:
        """One request; entries that fail for a reason that may pass are asked for once more."""
        done: dict[str, Any] = {}
        failed: dict[str, QueuesError] = {}
        left = entries
        for _ in range(ATTEMPTS):
            try:
                answer = self._ask(operation, queue, Entries=[{"Id": id_, **entry} for id_, entry in left.items()])
            except MessageRefused as error:
                # One entry spoils the request, so each is asked for alone.
                alone = left.items() if len(left) > 1 else ()
                failed |= dict.fromkeys(left, refusal(str(error)))
                for answers, errors in [self._batch(operation, queue, {id_: entry}, refusal) for id_, entry in alone]:
                    done |= answers
                    failed |= errors
                break
            except QueuesError as error:
                failed |= dict.fromkeys(left, error)
                break
            done |= {entry["Id"]: entry for entry in answer.get("Successful", ())}
            said = {entry["Id"]: _entry_problem(operation, queue, entry, refusal) for entry in answer.get("Failed", ())}
            unsaid = AnswerLost(f"{operation} on {queue} at {self.address}: SQS said nothing of some entries")
            failed |= {id_: said.get(id_, unsaid) for id_ in left}
            left = {id_: e for id_, e in left.items() if id_ not in done and isinstance(failed[id_], QueueUnavailable)}
            if not left:
                break
            self._pause()
        return done, {id_: error for id_, error in failed.items() if id_ not in done}

    def _retention(self, queue: str) -> int:
        if queue not in self._retentions:
            found = self._attributes(queue, "MessageRetentionPeriod")
            with self._understanding(queue):
                self._retentions[queue] = int(found["MessageRetentionPeriod"])
        return self._retentions[queue]

    def _attributes(self, queue: str, *names: str) -> dict[str, str]:
        answer = self._ask("get_queue_attributes", queue, AttributeNames=list(names))
        return dict(answer.get("Attributes", {}))

    def _look_up(self, queue: str) -> str:
        answer = self._call("get_queue_url", queue, QueueName=queue)
        with self._understanding(queue):
            url = self._urls[queue] = str(answer["QueueUrl"])
        return url

    def _ask(self, operation: str, queue: str, **values: Any) -> dict[str, Any]:
        self.limits.check_queue(queue)
        url = self._urls.get(queue) or self._look_up(queue)
        return self._call(operation, queue, QueueUrl=url, **values)

    def _call(self, operation: str, queue: str, **values: Any) -> dict[str, Any]:
        """SQS's answer. What may pass is asked once more, refused credentials with those that are there now."""
        was_lost = False
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return dict(getattr(self._client, operation)(**values))
            except SDK_ERRORS as error:
                problem = self._problem(error, operation, queue)
                was_lost = was_lost or isinstance(problem, AnswerLost)
                may_pass = isinstance(problem, QueueUnavailable) and not problem.retry_after_s
                if attempt == ATTEMPTS or not (may_pass or isinstance(problem, CredentialsError)):
                    # What AWS says about a wrong signature repeats the session token.
                    cause = None if isinstance(problem, CredentialsError) else error
                    raise (AnswerLost(str(problem)) if was_lost else problem) from cause
            if isinstance(problem, CredentialsError):
                self._client.close()
                self._client = self._connect()
            else:
                self._pause()
        raise AssertionError  # unreachable: the last attempt returns or raises

    def _pause(self) -> None:
        self._stopped.wait(random.uniform(*RETRY_PAUSE_S))  # noqa: S311 - it only spreads retries

    def _problem(self, error: Exception, operation: str, queue: str) -> QueuesError:
        what = f"{operation} {queue} at {self.address}"
        if isinstance(error, sdk.ClientError):
            return _answered_problem(error, what)
        kind = next(kind for causes, kind in KINDS if isinstance(error, causes))
        return kind(f"{what}: {error}" + (f": {HOW_TO_LOG_IN}" if kind is CredentialsError else ""))

    @contextmanager
    def _understanding(self, queue: str) -> Iterator[None]:
        """For what is read out of an answer: what is missing there is no empty queue."""
        try:
            yield
        except (KeyError, TypeError, ValueError) as error:
            raise QueueUnavailable(f"{queue} at {self.address}: this is no answer of SQS: {error!r}") from error

    def _of(self, claim: Claim, messages: Collection[Message] | None) -> tuple[SqsClaim, list[Message]]:
        """The claim as ours, and the messages (default: all of it) that it has not deleted yet."""
        if not isinstance(claim, SqsClaim):
            raise ConfigError(f"claim {claim.id} is none of {self.address}")
        wanted = claim.messages if messages is None else messages
        return claim, [message for message in wanted if message.id not in claim.deleted]

    def _check_post(self, queue: str, ttl: int | None) -> None:
        self.limits.check_queue(queue)
        if ttl is not None:
            self._refuse("has one message TTL for the whole queue: post without one")

    def _raise_unless_lost(self, failed: Mapping[str, QueuesError]) -> None:
        for error in failed.values():
            if not isinstance(error, ClaimLost):
                raise error

    def _refuse(self, reason: str) -> NoReturn:
        raise ConfigError(f"{self.limits.service} {reason}")


def _check_endpoint(url: str) -> None:
    if not ENDPOINT.fullmatch(url):
        raise ConfigError(f"an endpoint of Amazon SQS is https://..., or http:// to this machine: {WRITE}")


def _split(entries: Mapping[str, dict[str, Any]], most_bytes: int) -> Iterator[dict[str, dict[str, Any]]]:
    """Batches of entries, in order, as large as a request of SQS may be."""
    batch: dict[str, dict[str, Any]] = {}
    size = 0
    for id_, entry in entries.items():
        length = len(entry.get("MessageBody", ""))  # ASCII: as many bytes
        if batch and (len(batch) == LIMITS.post_batch or size + length > most_bytes):
            yield batch
            batch, size = {}, 0
        batch[id_] = entry
        size += length
    if batch:
        yield batch


def _message(entry: Mapping[str, Any], retention: int, now: float) -> Message:
    text, attributes = entry["Body"], entry["Attributes"]
    if hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() != entry["MD5OfBody"]:
        raise ValueError("a body was damaged on its way")
    return Message(
        id=entry["MessageId"],
        body=decode(text),
        age=max(0.0, now - int(attributes["SentTimestamp"]) / 1000),
        ttl=retention,
        receive_count=int(attributes["ApproximateReceiveCount"]),
        handle=entry["ReceiptHandle"],
    )


def _name(code: object) -> str:
    return re.split("[.#]", str(code))[-1].removesuffix("Exception")


def _entry_problem(operation: str, queue: str, entry: Mapping[str, Any], refusal: type[QueueError]) -> QueuesError:
    """The error of one entry of a batch. refusal: what SQS will never do."""
    text = f"{operation} {queue}: {entry.get('Code')}: {entry.get('Message')}"
    kind = CODES.get(_name(entry.get("Code")), refusal)
    if kind is QueueUnavailable or not entry.get("SenderFault"):
        return QueueUnavailable(text)
    return QueueForbidden(text) if kind is QueueForbidden else refusal(text)


def _answered_problem(error: sdk.ClientError, what: str) -> QueuesError:
    answer, about = error.response.get("Error", {}), error.response.get("ResponseMetadata", {})
    names = [_name(answer.get("Code")), _name(type(error).__name__)]
    status = about.get("HTTPStatusCode", 0)
    kind = next((CODES[name] for name in names if name in CODES), None) or _kind_of_status(status)
    text = f"{what}: {names[0]} ({status}): {answer.get('Message')}"
    if kind is CredentialsError:
        return kind(f"{what}: AWS refuses the credentials ({names[0]}), or this clock is wrong: {HOW_TO_LOG_IN}")
    if kind is QueueNotFound:
        return kind(f"{what}: the queue does not exist, or is hidden from these credentials: create it with --create")
    if kind is QueueUnavailable:
        asked = about.get("HTTPHeaders", {}).get("retry-after", "")
        return QueueUnavailable(text, retry_after_s=BUSY_S.get(names[0], int(asked) if asked.isdecimal() else None))
    return kind(text)


def _kind_of_status(status: int) -> type[QueuesError]:
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return QueueUnavailable
    return BY_STATUS.get(status, QueueError)
