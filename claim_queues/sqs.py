"""Amazon SQS through boto3.

SQS knows no claims: each message is held for itself, by a receipt handle, and a claim here is what one receive
brought. Nor does it tell of a loss: it answers a visibility change by an expired handle with success and does nothing
(seen on AWS: localstack/localstack#9632), and a late delete "succeeds, but the message might not be deleted". So a
claim carries its own deadlines, from before the receive was asked for; what has passed them is lost. Numbers and
quotations without a source are from the SQS API reference and developer guide ("Amazon SQS message quotas").
"""

import hashlib
import math
import random
import re
import threading
import time
import uuid
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, Self
from urllib.parse import parse_qsl, urlencode

from .base import (
    JSON,
    Claim,
    Limits,
    Message,
    Outgoing,
    Page,
    Queues,
    Range,
    Settled,
    Settlement,
    Stats,
    ahead_of,
    decode,
)
from .errors import (
    AnswerLost,
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    PostIncomplete,
    QueueError,
    QueueNotFound,
    QueuesError,
    QueueUnavailable,
)
from .sqs_client import SDK_ERRORS, WRITE, connect, entry_problem, problem, source, understanding

LONGEST_RETENTION_S, USUAL_RETENTION_S = 1_209_600, 345_600
LONGEST_HOLD_S = 43_200
"""Since the receive, renewals and delays included; SQS refuses what would go beyond, and shortens nothing."""
MOST = 10
"""Messages in one request."""

LIMITS = Limits(
    service="Amazon SQS",
    claim_ttl=Range(1, LONGEST_HOLD_S),
    grace=None,
    message_ttl=None,
    keeps_for_ever=False,
    claim_limit=MOST,
    post_batch=MOST,
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

POLL_S = 2
"""Longest single long poll (SQS takes 20 s), so that stop_waiting() ends a wait within so long and a round trip."""
RETRY_PAUSE_S = (0.05, 0.5)

Entry = dict[str, Any]
"""What a batch asks for one message, or what SQS answers to that."""
Results = tuple[dict[str, Entry], dict[str, QueuesError]]
"""Of a batch, by entry id: SQS's answers, and the errors of the other entries."""


@dataclass(frozen=True, slots=True)
class SqsClaim(Claim):
    """A claim, and what SQS does not remember of it.

    asked_at: monotonic time before the receive. until: by message id, the monotonic time up to which it is surely ours.
    """

    asked_at: float
    until: dict[str, float] = field(compare=False)
    deleted: set[str] = field(default_factory=set, compare=False)

    def holds(self, message: Message) -> bool:
        return message.id not in self.deleted and time.monotonic() < self.until.get(message.id, -math.inf)


class SqsQueues(Queues):
    """The queues of a region, or of the local server at `endpoint`; boto3 looks for credentials as it always does.

    profile: name of an AWS profile, None for the usual one.
    """

    limits = LIMITS
    ready_after_s = 1.0
    """A new queue can be used after so long (CreateQueue)."""

    def __init__(self, region: str, *, endpoint: str | None = None, profile: str | None = None) -> None:
        given = {name: value for name, value in (("endpoint", endpoint), ("profile", profile)) if value}
        self.address = f"sqs://{region}" + (f"?{urlencode(given, safe=':/[]')}" if given else "")
        self._connect = partial(connect, self.address, region, endpoint, profile)
        self.requests = Counter()
        self._source = partial(source, profile)
        self._stopped = threading.Event()
        self._url = cache(self._look_up)
        self._retention = cache(lambda queue: self._numbers(queue, "MessageRetentionPeriod")[0])
        self._client = self._connect()

    @property
    def credentials(self) -> str:
        return f"those that boto3 finds ({self._source()})"

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open sqs://REGION?endpoint=URL&profile=NAME; raises ConfigError or CredentialsError with what to write."""
        found = re.fullmatch(r"sqs://([a-z0-9-]+)/?(?:\?([^#]*))?", url)
        pairs = parse_qsl(found[2] or "", keep_blank_values=True) if found else []
        options = dict(pairs)
        unknown = options.keys() - {"endpoint", "profile"}
        if not found or len(options) < len(pairs) or unknown or "" in options.values():
            # No more is repeated than what looks like a name: who gets it wrong may have written a key into it.
            named = ", ".join(name for name in sorted(unknown) if re.fullmatch("[a-z_]{1,20}", name) and options[name])
            what = f"sqs:// takes no such option: {named}" if named else "this is no URL of Amazon SQS"
            raise ConfigError(f"{what}: {WRITE}")
        return cls(found[1], **options)

    def create(self, queue: str) -> None:
        """Make the queue if it is missing, with the longest retention (14 days): messages have no TTL of their own."""
        if not self.exists(queue):
            # The same values for every queue, so that two who create one at the same moment agree.
            values = {"MessageRetentionPeriod": LONGEST_RETENTION_S, "MaximumMessageSize": self.limits.message_bytes}
            self._call("create_queue", queue, QueueName=queue, Attributes={name: str(n) for name, n in values.items()})
            self._stopped.wait(self.ready_after_s)

    def exists(self, queue: str) -> bool:
        self.limits.check_queue(queue)
        try:
            return bool(self._look_up(queue))
        except QueueNotFound:
            return False

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        self._check_post(queue, ttl)
        texts = enumerate([self.limits.encode(body) for body in bodies])
        entries = {str(index): {"MessageBody": text} for index, text in texts}
        stored, failed = self._batch("send_message_batch", queue, entries, MessageRefused)
        accepted = {int(index): str(entry["MessageId"]) for index, entry in stored.items()}
        if not failed:
            return [accepted[index] for index in range(len(bodies))]
        unknown = [int(index) for index, error in failed.items() if isinstance(error, AnswerLost)]
        refused = {int(index): str(error) for index, error in failed.items() if not isinstance(error, AnswerLost)}
        error = min(failed.values(), key=lambda error: not isinstance(error, MessageRefused))
        if not accepted and not unknown:
            raise error
        text = f"{len(accepted)} of {len(bodies)} bodies were accepted: {error}"
        raise PostIncomplete(text, accepted=accepted, refused=refused, unknown=unknown) from error

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """wait: rounded up to whole seconds; with 0 SQS asks only some of its servers and may overlook messages."""
        self.limits.check_queue(queue)
        self.limits.check_claim(ttl=ttl, grace=grace, limit=limit)
        give_up_at = time.monotonic() + wait
        while True:
            asked_at = time.monotonic()
            left = 0.0 if self._stopped.is_set() else give_up_at - asked_at
            seconds = max(0, min(POLL_S, math.ceil(left)))
            if messages := self._receive(queue, ttl, limit, seconds):
                until = {message.id: asked_at + ttl for message in messages}
                return SqsClaim(uuid.uuid4().hex, queue, messages, grace, asked_at, until)
            # A server that does not wait is not asked again and again.
            self._stopped.wait(max(0.0, asked_at + min(seconds, left) - time.monotonic()))
            if self._stopped.is_set() or time.monotonic() >= give_up_at:
                return None

    def renew(self, claim: Claim, *, ttl: int, messages: Collection[Message] | None = None) -> None:
        """A message that would be held for more than 12 h since its receive counts as lost."""
        self.limits.check_claim(ttl=ttl, grace=claim.grace, limit=1)
        held, wanted = self._open(claim, messages)
        lost = {message.id for message in wanted} - self._hide(held, wanted, ttl, time.monotonic() + ttl)
        if lost:
            raise ClaimLost(f"claim {claim.id} on {claim.queue} lost {len(lost)} messages", ids=frozenset(lost))

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """When it is repeated after an error, what was posted or deleted before stays so and is not asked for again."""
        for post in [post for each in settlements for post in each.posts]:
            self._check_post(post.queue, post.ttl)
        held, _ = self._open(claim, ())
        # Looked up before the posts: a renewal that ends meanwhile must not let delete what was not posted for.
        ours = [each for each in settlements if held.holds(each.message)]
        failed = self._store(held, ours)
        stored = [each.message for each in ours if each.message.id not in failed and held.holds(each.message)]
        handles = {message.id: {"ReceiptHandle": message.handle} for message in stored}
        deleted, undeleted = self._batch("delete_message_batch", held.queue, handles, ClaimLost)
        held.deleted.update(deleted)
        _raise_other(failed | undeleted, MessageRefused, ClaimLost)
        refused = {id_: error for id_, error in failed.items() if isinstance(error, MessageRefused)}
        ids = frozenset(each.message.id for each in settlements)
        return Settled(deleted=ids & held.deleted, lost=ids - held.deleted - refused.keys(), refused=refused)

    def release(self, claim: Claim, messages: Collection[Message] | None = None, *, delay: float = 0) -> None:
        """A delay ends 12 h after the receive at the latest."""
        self.limits.check_release(delay=delay)
        held, wanted = self._open(claim, messages)
        # A second less than SQS allows, for the request's own time.
        longest = LONGEST_HOLD_S - 1 - math.ceil(time.monotonic() - held.asked_at)
        self._hide(held, wanted, max(0, min(math.ceil(delay), longest)), -math.inf)

    def browse(self, queue: str, *, after: str = "", limit: int = 20, claimed: bool = False, wait: float = 0) -> Page:
        raise ConfigError("Amazon SQS cannot show messages without claiming them")

    def end_marker(self, queue: str) -> str:
        raise ConfigError("Amazon SQS cannot show messages without claiming them, so it has no markers")

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        raise ConfigError("Amazon SQS deletes claimed messages only, never by id")

    def purge(self, queue: str) -> None:
        """Remove all messages, claimed ones too; it takes up to 60 s, and what is posted meanwhile may go as well."""
        self._ask("purge_queue", queue)

    def stats(self, queue: str) -> Stats:
        """The numbers are approximate; what was released with a delay counts as claimed."""
        kinds = ("", "NotVisible", "Delayed")
        free, claimed, delayed = self._numbers(queue, *(f"ApproximateNumberOfMessages{kind}" for kind in kinds))
        return Stats(free, claimed, delayed, None)

    def inspect(self, queue: str) -> list[str]:
        found = self._ask("get_queue_attributes", queue, AttributeNames=["RedrivePolicy"])
        policy = found.get("Attributes", {}).get("RedrivePolicy")
        names = ("MessageRetentionPeriod", "DelaySeconds", "MaximumMessageSize")
        retention, delay, largest = self._numbers(queue, *names)
        warnings = {
            f"has a redrive policy ({policy}): SQS itself moves away what is received so often, in an outage of the"
            " maker too; remove the policy": policy,
            f"keeps messages for {retention:,} s, claimed or not: raise its MessageRetentionPeriod (up to"
            f" {LONGEST_RETENTION_S:,})": retention < USUAL_RETENTION_S,
            f"hides each new message for {delay} s: set its DelaySeconds to 0": delay > 0,
            f"takes bodies up to {largest:,} bytes: raise its MaximumMessageSize": largest < self.limits.message_bytes,
        }
        return [f"queue {queue} {text}" for text, holds in warnings.items() if holds]

    def clock_ahead(self, queue: str) -> float | None:
        found = self._ask("get_queue_attributes", queue, AttributeNames=["QueueArn"])
        return ahead_of(found.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date"))

    def stop_waiting(self) -> None:
        self._stopped.set()

    def close(self) -> None:
        self.stop_waiting()
        self._client.close()

    def _receive(self, queue: str, ttl: int, limit: int, wait: int) -> tuple[Message, ...]:
        retention = self._retention(queue)  # first: if this fails, nothing was received and hidden
        answer = self._ask(
            "receive_message",
            queue,
            MaxNumberOfMessages=limit,
            VisibilityTimeout=ttl,
            WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["ApproximateReceiveCount", "SentTimestamp"],
        )
        with understanding(f"{queue} at {self.address}"):
            # By id: SQS may deliver a message twice, even at once, and the newest handle is the one to use.
            found = {entry["MessageId"]: _message(entry, retention) for entry in answer.get("Messages", ())}
        return tuple(found.values())

    def _open(self, claim: Claim, messages: Collection[Message] | None) -> tuple[SqsClaim, list[Message]]:
        """The claim as ours, and the messages (default: all of it) that it has not deleted yet."""
        if not isinstance(claim, SqsClaim):
            raise ConfigError(f"claim {claim.id} is none of {self.address}")
        wanted = claim.messages if messages is None else messages
        return claim, [message for message in wanted if message.id not in claim.deleted]

    def _hide(self, held: SqsClaim, messages: Iterable[Message], seconds: int, until: float) -> set[str]:
        """Hide those that are still ours for so long; those hidden count as ours until then. Gives their ids."""
        entries = {m.id: {"ReceiptHandle": m.handle, "VisibilityTimeout": seconds} for m in messages if held.holds(m)}
        hidden, failed = self._batch("change_message_visibility_batch", held.queue, entries, ClaimLost)
        held.until.update(dict.fromkeys(hidden, until))
        _raise_other(failed, ClaimLost)
        return set(hidden)

    def _store(self, held: SqsClaim, settlements: Iterable[Settlement]) -> dict[str, QueuesError]:
        """Post what is not posted yet; gives the errors by message id."""
        failed: dict[str, QueuesError] = {}
        outcomes: list[Outgoing] = []
        for each in settlements:
            posts = [(place, post.queue, post.body) for place, post in enumerate(each.posts)]
            try:
                outcomes += [Outgoing(each.message.id, n, name, self.limits.encode(body)) for n, name, body in posts]
            except MessageRefused as error:
                failed[each.message.id] = error
        for queue in dict.fromkeys(outcome.queue for outcome in outcomes):
            wanted = [each for each in outcomes if each.queue == queue and each not in held.posted]
            wanted = [each for each in wanted if each.message_id not in failed]
            entries = {str(number): {"MessageBody": outcome.text} for number, outcome in enumerate(wanted)}
            stored, errors = self._batch("send_message_batch", queue, entries, MessageRefused)
            held.posted.update(wanted[int(number)] for number in stored)
            failed |= {wanted[int(number)].message_id: error for number, error in errors.items()}
        return failed

    def _batch(
        self, operation: str, queue: str, entries: Mapping[str, Entry], refusal: type[QueueError], most: int = MOST
    ) -> Results:
        """Ask in as few requests as SQS lets us, each for up to `most` entries.

        refusal: what an entry's own failure means. Any other failure ends it: later entries are not asked for.
        """
        done: dict[str, Entry] = {}
        failed: dict[str, QueuesError] = {}
        for batch in _split(entries, most):
            obstacle = next((error for error in failed.values() if not isinstance(error, refusal)), None)
            if obstacle:
                failed |= dict.fromkeys(batch, QueueUnavailable(f"not asked for, since {obstacle}"))
            else:
                answers, errors = self._request(operation, queue, batch, refusal)
                done |= answers
                failed |= errors
        return done, failed

    def _request(
        self, operation: str, queue: str, batch: Mapping[str, Entry], refusal: type[QueueError], *, again: bool = True
    ) -> Results:
        """One request; entries that fail for a reason that may pass are asked for once more."""
        try:
            answer = self._ask(operation, queue, Entries=[{"Id": id_, **entry} for id_, entry in batch.items()])
        except MessageRefused as error:
            if len(batch) == 1:
                return {}, dict.fromkeys(batch, refusal(str(error)))
            # One entry spoils the request, so each is asked for alone.
            return self._batch(operation, queue, batch, refusal, most=1)
        except QueuesError as error:
            return {}, dict.fromkeys(batch, error)
        what = f"{operation} {queue} at {self.address}"
        done = {entry["Id"]: entry for entry in answer.get("Successful", ())}
        failed: dict[str, QueuesError] = dict.fromkeys(batch, AnswerLost(f"{what}: SQS said nothing of some entries"))
        failed |= {e["Id"]: entry_problem(e, operation, what, refusal) for e in answer.get("Failed", ())}
        left = {id_: entry for id_, entry in batch.items() if type(failed[id_]) is QueueUnavailable}
        if left and again:
            self._pause()
            answers, errors = self._request(operation, queue, left, refusal, again=False)
            done |= answers
            failed |= errors
        return done, {id_: error for id_, error in failed.items() if id_ not in done}

    def _numbers(self, queue: str, *attributes: str) -> list[int]:
        answer = self._ask("get_queue_attributes", queue, AttributeNames=attributes)
        with understanding(f"{queue} at {self.address}"):
            return [int(answer["Attributes"][name]) for name in attributes]

    def _look_up(self, queue: str) -> str:
        answer = self._call("get_queue_url", queue, QueueName=queue)
        with understanding(f"{queue} at {self.address}"):
            return str(answer["QueueUrl"])

    def _ask(self, operation: str, queue: str, **values: Any) -> Entry:
        self.limits.check_queue(queue)
        return self._call(operation, queue, QueueUrl=self._url(queue), **values)

    def _call(self, operation: str, queue: str, **values: Any) -> Entry:
        """SQS's answer. What may pass is asked once more, refused credentials with those that are there now."""
        before: QueuesError | None = None
        while True:
            self.requests[operation] += 1
            try:
                return dict(getattr(self._client, operation)(**values))
            except SDK_ERRORS as error:
                found = problem(error, f"{operation} {queue} at {self.address}")
            if isinstance(before, AnswerLost):
                raise AnswerLost(str(found)) from found
            if before is None and isinstance(found, CredentialsError):
                self._client.close()
                self._client = self._connect()
            elif before is None and isinstance(found, QueueUnavailable) and not found.retry_after_s:
                self._pause()
            else:
                raise found
            before = found

    def _pause(self) -> None:
        self._stopped.wait(random.uniform(*RETRY_PAUSE_S))  # noqa: S311 - it only spreads retries

    def _check_post(self, queue: str, ttl: int | None) -> None:
        self.limits.check_queue(queue)
        if ttl is not None:
            raise ConfigError("Amazon SQS has one message TTL for the whole queue: post without one")


def _split(entries: Mapping[str, Entry], most: int) -> list[dict[str, Entry]]:
    """Batches of up to `most` entries, in order, as large as a request of SQS may be."""
    batches: list[dict[str, Entry]] = []
    room = 0
    for id_, entry in entries.items():
        size = len(entry.get("MessageBody", ""))  # ASCII: as many bytes
        if not batches or size > room or len(batches[-1]) == most:
            batches.append({})
            room = LIMITS.message_bytes
        batches[-1][id_] = entry
        room -= size
    return batches


def _message(entry: Entry, retention: int) -> Message:
    text, attributes = entry["Body"], entry["Attributes"]
    if hashlib.md5(text.encode(), usedforsecurity=False).hexdigest() != entry["MD5OfBody"]:
        raise ValueError("a body was damaged on its way")
    return Message(
        id=entry["MessageId"],
        body=decode(text),
        age=max(0.0, time.time() - int(attributes["SentTimestamp"]) / 1000),
        ttl=retention,
        receive_count=int(attributes["ApproximateReceiveCount"]),
        handle=entry["ReceiptHandle"],
    )


def _raise_other(failed: Mapping[str, QueuesError], *expected: type[QueuesError]) -> None:
    for error in failed.values():
        if not isinstance(error, expected):
            raise error
