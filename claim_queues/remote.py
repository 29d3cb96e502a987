"""What the services behind a network share: their URLs, and posts whose answers may be partial or lost."""

import re
import threading
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from urllib.parse import parse_qsl, urlencode

from .base import JSON, Claim, Queues, Settled, Settlement
from .errors import AnswerLost, ConfigError, MessageRefused, PostIncomplete, QueuesError, QueueUnavailable

ENDPOINT = (
    r"(?ai)(https?://(localhost|127(?:\.\d{1,3}){3}|\[::1\])|https://(?:[\w.-]+|\[[\da-f:.]+\]))(:\d{1,5})?(/[^?#]*)?"
)
Stored = str | QueuesError  # the id of a stored message, or why the message is not stored


class RemoteQueues(Queues):
    """Posts in as few requests as the service takes, and settles: outcomes first, then the deletes.

    request_room: the bytes that a request has for documents, each of which takes one byte more than its length.
    """

    request_room: int

    def __init__(self) -> None:
        self._stopped = threading.Event()
        self._has_worked = False

    @abstractmethod
    def _document(self, body: JSON, ttl: int | None) -> str:
        """The body in the form of the service; raises MessageRefused if it will never be accepted."""

    @abstractmethod
    def _send_batch(self, queue: str, documents: Sequence[str]) -> Sequence[Stored]:
        """Send one request; returns results for all or the first few. MessageRefused: one document spoils all."""

    @abstractmethod
    def _delete_settled(self, claim: Claim, settlements: Sequence[Settlement]) -> None:
        """Delete messages whose outcomes are stored. Add deleted ones to `claim.deleted`, even before an error."""

    def post(self, queue: str, bodies: Sequence[JSON], *, ttl: int | None = None) -> list[str]:
        results = self._store(queue, [self._document(body, ttl) for body in bodies])
        accepted = {index: found for index, found in enumerate(results) if isinstance(found, str)}
        errors = {index: found for index, found in enumerate(results) if isinstance(found, QueuesError)}
        if not errors:
            return list(accepted.values())
        first, unknown = next(iter(errors.values())), [i for i, each in errors.items() if isinstance(each, AnswerLost)]
        if not accepted and not unknown:
            raise first
        refused = {index: str(error) for index, error in errors.items() if index not in unknown}
        said = f"{first}; {len(accepted):,} of {len(bodies):,} were accepted"
        raise PostIncomplete(said, accepted=accepted, refused=refused, unknown=unknown)

    def settle(self, claim: Claim, settlements: Sequence[Settlement]) -> Settled:
        """After an error, call it again with the same settlements."""
        held = {message.id for message in claim.messages if claim.holds(0)} - claim.deleted
        ours = [each for each in settlements if each.message.id in held]
        failed = self._post_outcomes(claim, ours)
        self._delete_settled(claim, [each for each in ours if each.message.id not in failed])
        raise_obstacle(failed.values())
        deleted = claim.deleted.intersection(each.message.id for each in settlements)
        claim.drop(deleted)
        claim.deleted -= deleted
        return Settled(frozenset(deleted), {id_: e for id_, e in failed.items() if isinstance(e, MessageRefused)})

    def stop_waiting(self) -> None:
        self._stopped.set()

    def _post_outcomes(self, claim: Claim, settlements: Sequence[Settlement]) -> dict[str, QueuesError]:
        """Post what is not posted yet; gives the errors by message id."""
        failed: dict[str, QueuesError] = {}
        outcomes: dict[str, dict[tuple[str, int], str]] = defaultdict(dict)
        for message, posts, _ in sorted(settlements, key=lambda each: -len(each.posts)):  # dead letters first
            try:
                documents = [(post.queue, self._document(post.body, post.ttl)) for post in posts]
                for place, (queue, document) in enumerate(documents):
                    outcomes[queue][message.id, place] = document
            except MessageRefused as error:
                failed[message.id] = error
        for queue, wanted in outcomes.items():
            keys = [key for key in wanted if key not in claim.posted and key[0] not in failed]
            for key, found in zip(keys, self._store(queue, [wanted[key] for key in keys]), strict=True):
                if isinstance(found, str):
                    claim.posted.add(key)
                else:
                    failed.setdefault(key[0], found)
        return failed

    def _store(self, queue: str, documents: Sequence[str]) -> list[Stored]:
        """The id or the error of each document. After any error but a refusal of one, nothing more is sent."""
        results: list[Stored] = []
        most = self.limits.post_limit
        while rest := documents[len(results) :]:
            ends = accumulate(len(each.encode()) + 1 for each in rest[:most])
            batch = rest[: max(1, sum(end <= self.request_room for end in ends))]
            try:
                results += self._send_batch(queue, batch)
            except MessageRefused as error:
                results += [error] if len(batch) == 1 else []
                most = 1  # one by one, to find the refused one
            except QueuesError as error:
                unsent = QueueUnavailable(str(error)) if isinstance(error, AnswerLost) else error
                results += [error] * len(batch) + [unsent] * (len(rest) - len(batch))
        return results


def raise_obstacle(errors: Iterable[QueuesError]) -> None:
    """Raise the first error that is not the refusal of a single message."""
    for error in errors:
        if not isinstance(error, MessageRefused):
            raise error


def split_url(url: str, place: str, options: Collection[str], usage: str) -> tuple[str, dict[str, str]]:
    """Split a queue URL into a place of that pattern and options. ConfigError shows no URL: it may hold a secret."""
    found = re.fullmatch(rf"\w+://({place})/?(?:\?(?P<query>[^#]*))?", url)
    pairs = parse_qsl(found["query"] or "", keep_blank_values=True) if found else []
    given = {name: value for name, value in pairs if value and name in options}
    if not found or len(given) < len(pairs):
        raise ConfigError(f"this is not a queue URL, or it holds a secret: {usage}")
    return found[1], given


def with_options(address: str, options: Mapping[str, str | None]) -> str:
    """The address, followed by the options that are given, always in the same order."""
    given = {name: value for name, value in sorted(options.items()) if value}
    return address + (f"?{urlencode(given, safe=':/[]')}" if given else "")


def is_here(endpoint: str) -> bool:
    """Whether it is on this machine. Raises ConfigError if it holds a secret, or would receive secrets unencrypted."""
    if not (found := re.fullmatch(ENDPOINT, endpoint)):
        shown = endpoint.rpartition("@")[2].partition("?")[0]
        raise ConfigError(f"endpoint {shown}: only https is safe, or http to this very machine, without a password")
    return bool(found[2])
