"""Amazon SQS through boto3.

SQS has no claims: each message is hidden by itself, under a receipt handle; a claim here is what one receive brought.
Nor does SQS report a lost message: a delete by an old handle "succeeds, but the message might not be deleted", and a
released message's handle still works. So our own clock, and what has left the claim, decide what is ours. Numbers and
quotations without a source are from the SQS API reference and developer guide.
"""

import math
import re
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Self, TypeVar

import boto3
from botocore import exceptions as sdk
from botocore.config import Config
from botocore.parsers import ResponseParserError

from . import errors
from .base import JSON, Claim, Limits, Message, Settlement, Stats, check_queue, decode, expiry
from .errors import AnswerLost, ConfigError, CredentialsError, MessageRefused, QueuesError, QueueUnavailable
from .remote import RemoteQueues, Stored, is_here, raise_obstacle, split_url, with_options

T = TypeVar("T")
Entry = dict[str, Any]  # what a batch asks for one message, or a part of what SQS answers
Results = tuple[dict[str, Entry], dict[str, QueuesError]]
"""SQS's answers by entry id, and the errors of the other entries: MessageRefused for what it will never accept."""
LONGEST_RETENTION_S, SHORT_RETENTION_S = 1_209_600, 345_600
MOST_BYTES = 1_048_576  # of a message, and of the messages of a batch together (SendMessageBatch)
LONGEST_HOLD_S = 43_200  # since the receive, renewals and delays included; SQS refuses what would go beyond
POSTING, CLAIMING = ("send_message_batch",), ("delete_message_batch", "change_message_visibility_batch")
POLL_S = 2  # longest single long poll (SQS takes 20 s): stop_waiting() ends a wait within that
USAGE = "write sqs://REGION, with ?endpoint=URL for a local server and profile=NAME for one of your AWS profiles"
HINTS = {
    CredentialsError: ": set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or write ~/.aws/credentials",
    errors.QueueNotFound: ": create it with --create",
}
UNSENDABLE = {0xFFFE: r"\ufffe", 0xFFFF: r"\uffff"}
"""Characters that JSON text can hold but SQS refuses (SendMessage), with their JSON escapes."""
FAILURES = (sdk.BotoCoreError, sdk.ClientError, ResponseParserError, RuntimeError, KeyError, TypeError, ValueError)
"""What boto3 raises (RuntimeError: new credentials that are expired), and what reading its answers raises."""
ERRORS: dict[type[QueuesError], str] = {
    AnswerLost: "ChecksumError|HTTPClientError|IncompleteReadError|ResponseParserError|KeyError|TypeError|ValueError",
    QueueUnavailable: "ConnectionError|MetadataRetrievalError|Internal|OverLimit|PurgeQueueInProgress|Thrott"
    "|QueueDeletedRecently|Request(Aborted|Timeout)| 429$| 5..$",
    errors.QueueNotFound: "NonExistentQueue|QueueDoesNotExist",
    CredentialsError: "BotoCoreError|RuntimeError|Credential|Expired|InvalidSecurity|Signature|Token"
    "|UnrecognizedClient| 401$",
    errors.QueueForbidden: "AccessDenied|Kms|NotAuthorized| 403$",
    MessageRefused: "BatchRequestTooLong|InvalidMessageContents|InvalidParameterValue|RequestEntityTooLarge",
}
"""Patterns for the names of boto3's exception and its bases, SQS's code and the HTTP status. The first match counts."""


class SqsQueues(RemoteQueues):
    """The queues of a region, or of the server at `endpoint`."""

    limits = Limits(
        service="Amazon SQS",
        claim_limit=10,
        post_limit=10,
        message_bytes=MOST_BYTES,
        has_grace=False,
        has_message_ttl=False,
        can_browse=False,
        release_delay=LONGEST_HOLD_S,
        approximate_s=60,
        utf8=True,
    )
    request_room = MOST_BYTES
    ready_after_s = 1.0  # CreateQueue: "you must wait at least one second"

    def __init__(self, region: str, *, endpoint: str | None = None, profile: str | None = None) -> None:
        super().__init__()
        self.address = with_options(f"sqs://{region}", {"endpoint": endpoint, "profile": profile})
        self._region, self._endpoint, self._profile = region, endpoint, profile
        self._url = cache(self._look_up)
        try:
            self._client: Any = self._connect()
        except ValueError:
            raise ConfigError(f"boto3 cannot use the endpoint of the URL, environment or profile: {USAGE}") from None
        except FAILURES as error:
            raise _translated(error, f"connect to {self.address}") from None

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Open sqs://REGION?endpoint=URL&profile=NAME; raises ConfigError or CredentialsError with what to write."""
        region, options = split_url(url, "[a-z0-9-]+", ("endpoint", "profile"), USAGE)
        return cls(region, **options)

    def create(self, queue: str) -> None:
        """A new queue keeps messages for the longest time, 14 days: they have no TTL of their own."""
        if not self.exists(queue):
            # The same values for every queue, so that two who create one at the same moment agree.
            attributes = {"MessageRetentionPeriod": str(LONGEST_RETENTION_S), "MaximumMessageSize": str(MOST_BYTES)}
            self._ask("create_queue", queue, dict, QueueName=queue, Attributes=attributes)
            self._stopped.wait(self.ready_after_s)

    def exists(self, queue: str) -> bool:
        try:
            return bool(self._look_up(queue))
        except errors.QueueNotFound:
            return False

    def claim(self, queue: str, *, ttl: int, grace: int, limit: int, wait: float = 0) -> Claim | None:
        """wait: rounded up to whole seconds; with 0 SQS asks only some of its servers and may overlook messages."""
        give_up_at = time.monotonic() + wait
        names = ["ApproximateReceiveCount", "SentTimestamp"]
        values = {"MaxNumberOfMessages": limit, "VisibilityTimeout": ttl, "MessageSystemAttributeNames": names}
        while True:
            asked_at = time.monotonic()
            left = 0.0 if self._stopped.is_set() else give_up_at - asked_at
            seconds = max(0, min(POLL_S, math.ceil(left)))
            if messages := self._ask("receive_message", queue, _messages, **values, WaitTimeSeconds=seconds):
                return Claim(uuid.uuid4().hex, queue, ttl, grace, messages, expiry(asked_at, ttl))
            # A server that does not wait is not asked again and again.
            self._stopped.wait(max(0.0, asked_at + min(seconds, left) - time.monotonic()))
            if self._stopped.is_set() or time.monotonic() >= give_up_at:
                return None

    def renew(self, claim: Claim) -> None:
        """A message that SQS does not renew, for example 12 hours after its receive, leaves the claim."""
        asked_at = time.monotonic()
        renewed, failed = self._hide(claim, claim.ttl)
        claim.drop([id_ for id_, error in failed.items() if isinstance(error, MessageRefused)])
        raise_obstacle(failed.values())
        if not renewed:
            claim.expires_at = 0
            raise errors.ClaimLost(f"claim {claim.id} on {claim.queue} expired, or SQS renews none of its messages")
        claim.expires_at = expiry(asked_at, claim.ttl)

    def release(self, claim: Claim, *, delay: float = 0) -> None:
        """A message that SQS refuses to release, as with a delay beyond its 12 hours, is free when the claim ends."""
        released, failed = self._hide(claim, min(math.ceil(delay), LONGEST_HOLD_S))
        claim.drop(released)  # they may be another's when this is tried again
        raise_obstacle(failed.values())
        claim.expires_at = 0

    def browse(self, queue: str, *, after: str = "", limit: int = 20, wait: float = 0) -> tuple[list[Message], str]:
        raise ConfigError("Amazon SQS cannot show messages without claiming them")

    def delete(self, queue: str, ids: Sequence[str]) -> None:
        raise ConfigError("Amazon SQS deletes claimed messages only, never by id")

    def purge(self, queue: str) -> None:
        """It takes up to 60 s, and messages posted meanwhile may be deleted too."""
        self._ask("purge_queue", queue, dict)

    def stats(self, queue: str) -> Stats:
        """The numbers are approximate; what was released with a delay counts as claimed."""
        names = [f"ApproximateNumberOfMessages{kind}" for kind in ("", "NotVisible", "Delayed")]

        def read(answer: Entry) -> Stats:
            return Stats(*(int(answer["Attributes"][name]) for name in names))

        return self._ask("get_queue_attributes", queue, read, AttributeNames=names)

    def inspect(self, queue: str, *, is_posted_to: bool = False) -> list[str]:
        """Empty batches show what a policy forbids: SQS refuses them for another reason where it is allowed."""
        names = ["RedrivePolicy", "MessageRetentionPeriod"]
        attributes = self._ask("get_queue_attributes", queue, lambda it: dict(it["Attributes"]), AttributeNames=names)
        policy, retention = attributes.get("RedrivePolicy"), int(attributes["MessageRetentionPeriod"])
        moves = f"queue {queue} has a redrive policy ({policy}): SQS moves messages away, even while the maker is down"
        loses = f"queue {queue} keeps messages for {retention:,} s, claimed or not: raise its MessageRetentionPeriod"
        found = [moves] * bool(policy) + [loses] * (retention < SHORT_RETENTION_S)
        for operation in POSTING if is_posted_to else CLAIMING:
            try:
                self._ask(operation, queue, bool, Entries=[])
            except errors.QueueForbidden as error:
                found.append(str(error))
            except QueuesError:
                continue
        return found

    def close(self) -> None:
        self.stop_waiting()
        if self._client is not None:
            self._client.close()

    def _document(self, body: JSON, ttl: int | None) -> str:
        if ttl is not None:
            raise ConfigError("Amazon SQS has one message TTL for the whole queue: post without one")
        return self.limits.encode(body).translate(UNSENDABLE)

    def _send_batch(self, queue: str, documents: Sequence[str]) -> list[Stored]:
        entries = {str(index): {"MessageBody": document} for index, document in enumerate(documents)}
        stored, failed = self._batch("send_message_batch", queue, entries)
        return [failed.get(index) or str(stored[index]["MessageId"]) for index in entries]

    def _delete_settled(self, claim: Claim, settlements: Sequence[Settlement]) -> None:
        ours = [each.message for each in settlements if claim.holds(0)]  # it may have ended while outcomes were posted
        handles = {message.id: {"ReceiptHandle": message.handle} for message in ours}
        deleted, failed = self._batch("delete_message_batch", claim.queue, handles)
        claim.deleted.update(deleted)
        raise_obstacle(failed.values())

    def _hide(self, claim: Claim, seconds: int) -> Results:
        """Hide all messages of the claim for that long from now."""
        held = claim.messages if claim.holds(0) else ()
        entries = {each.id: {"ReceiptHandle": each.handle, "VisibilityTimeout": seconds} for each in held}
        try:
            return self._batch("change_message_visibility_batch", claim.queue, entries)
        except MessageRefused as error:  # moto refuses the whole batch for one entry
            return {}, dict.fromkeys(entries, error)

    def _batch(self, operation: str, queue: str, entries: Mapping[str, Entry]) -> Results:
        if not entries:
            return {}, {}
        what = f"{operation} {queue} at {self.address}"

        def read(answer: Entry) -> Results:
            done = {each["Id"]: each for each in answer.get("Successful", ())}
            silent = AnswerLost(f"{what}: SQS left some entries out of its answer")
            failed: dict[str, QueuesError] = {id_: silent for id_ in entries if id_ not in done}
            for each in answer.get("Failed", ()):
                status = {"HTTPStatusCode": 400 if each.get("SenderFault") else 500}
                error = sdk.ClientError({"Error": each, "ResponseMetadata": status}, operation)
                failed[each["Id"]] = _translated(error, what, MessageRefused)
            return done, failed

        return self._ask(operation, queue, read, Entries=[{"Id": id_} | entry for id_, entry in entries.items()])

    def _look_up(self, queue: str) -> str:
        return self._ask("get_queue_url", queue, lambda answer: str(answer["QueueUrl"]), QueueName=queue)

    def _ask(self, operation: str, queue: str, read: Callable[[Entry], T], **values: Any) -> T:
        """Call SQS; returns what `read` makes of its answer."""
        check_queue(queue)
        if "QueueName" not in values:
            values["QueueUrl"] = self._url(queue)
        try:
            client = self._client = self._client or self._connect()
            found = read(getattr(client, operation)(**values))
        except FAILURES as error:
            problem = _translated(error, f"{operation} {queue} at {self.address}")
            if not isinstance(problem, CredentialsError):
                raise problem from error
            if self._has_worked:
                self._client, problem = None, QueueUnavailable(str(problem))  # the next try reads credentials again
            raise problem from None  # AWS's words may repeat the session token
        self._has_worked = True
        return found

    def _connect(self) -> Any:
        session = boto3.Session(region_name=self._region, profile_name=self._profile)
        if (found := session.get_credentials()) is None:
            raise sdk.NoCredentialsError
        self.credentials = f"those that boto3 finds ({found.method})"
        limits = {"connect_timeout": 5, "read_timeout": 15, "max_pool_connections": 64}
        config = Config(**limits, retries={"mode": "standard", "total_max_attempts": 2})
        client = session.client("sqs", endpoint_url=self._endpoint, config=config)
        if is_here(client.meta.endpoint_url):  # which the environment or the profile can name too
            client.close()
            client = session.client("sqs", endpoint_url=self._endpoint, config=config.merge(Config(proxies={})))
        return client


def _translated(error: Exception, what: str, otherwise: type[QueuesError] = errors.QueueError) -> QueuesError:
    """The contract's error for it. what: the call that failed. otherwise: the class where ERRORS has none."""
    said, response = str(error).strip(), error.response if isinstance(error, sdk.ClientError) else {}
    code = str(response.get("Error", {}).get("Code", ""))
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    names = " ".join([*(base.__name__ for base in type(error).__mro__), code, str(status)])
    kind = next((kind for kind, known in ERRORS.items() if re.search(known, names)), otherwise)
    if code.isdecimal():  # boto3 would repeat the whole page
        said = f"HTTP {code}, not from SQS itself: look for a wrong region or endpoint, or for a proxy"
    elif code and kind is CredentialsError:  # what AWS says about a wrong signature repeats the session token
        said = f"AWS refuses the credentials ({code}), or this machine's clock is wrong"
    elif kind is AnswerLost:
        said = f"no answer from SQS that can be used: {error!r}"
    return kind(f"{what}: {said}{HINTS.get(kind, '')}")


def _messages(answer: Entry) -> tuple[Message, ...]:
    found = {}  # by id: SQS may deliver a message twice, even at once, and the newest handle is the one to use
    for entry in answer.get("Messages", ()):
        id_, about = entry["MessageId"], entry["Attributes"]
        age, count = time.time() - int(about["SentTimestamp"]) / 1000, int(about["ApproximateReceiveCount"])
        found[id_] = Message(id_, decode(entry["Body"]), max(0.0, age), count, entry["ReceiptHandle"])
    return tuple(found.values())
