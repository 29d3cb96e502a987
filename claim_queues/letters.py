"""Dead letters: how to tell them from other messages, find them, and bring them back to the request queue."""

import json
from collections.abc import Callable
from contextlib import suppress

from . import JSON, Claim, ConfigError, Message, Queues, QueuesError, Settlement
from .cli import one_line

PAGE = 100
SHOWN, SEARCHED = 50, 1000
"""A search ends when this many are found, or this many have been read."""


def is_letter(body: JSON) -> bool:
    """Whether a consumer wrote it: anybody can post to the queue."""
    return isinstance(body, dict) and "body" in body and isinstance(body.get("request_id"), str)


def as_text(body: JSON) -> str:
    """The body as people read and search it."""
    try:
        return json.dumps(body, ensure_ascii=False)
    except RecursionError:
        return "(nested too deep to be shown)"


def search(queues: Queues, queue: str, words: str, after: str) -> tuple[list[tuple[str, Message]], str]:
    """Messages after the marker that contain these words, each with the marker before its page; and the next marker.

    The next marker is empty at the end of the queue.
    """
    found, seen = list[tuple[str, Message]](), 0
    while len(found) < SHOWN and seen < SEARCHED:
        page, following = _browse(queues, queue, after)
        if not page:
            return found, ""
        found += [(after, message) for message in page if words.casefold() in as_text(message.body).casefold()]
        seen, after = seen + len(page), following
    return found, after


def find(queues: Queues, queue: str, id_: str, after: str) -> Message | None:
    """The message with that id, if it is on the page after that marker."""
    return next((message for message in _browse(queues, queue, after)[0] if message.id == id_), None)


def _browse(queues: Queues, queue: str, after: str) -> tuple[list[Message], str]:
    try:
        return queues.browse(queue, after=after, limit=SHOWN)
    except (ValueError, OverflowError) as error:  # some markers are numbers
        raise ConfigError(f"{one_line(after)!r}: there is no such place in the queue {queue}") from error


def bring_one_back(queues: Queues, letter: Message, letter_queue: str, request_queue: str, *, ttl: int | None) -> str:
    """Post the request of that dead letter, then delete the letter unless a claim holds it. Returns the new id."""
    (new_id,) = queues.post(request_queue, [letter.body["body"]], ttl=ttl)
    queues.delete(letter_queue, [letter.id])
    return new_id


def bring_back(
    queues: Queues,
    letter_queue: str,
    request_queue: str,
    *,
    limit: int,
    ttl: int | None,
    tell: Callable[[str, str], None],
) -> int:
    """Bring back as many as are there now, so that those that fail again meanwhile do not go round.

    Messages that are not dead letters are held to the end, to reach those behind them. Returns how many messages stay:
    these, and what another took meanwhile. tell: is given the old and the new id once the request is stored.
    """
    held, free = list[Claim](), queues.stats(letter_queue).free
    try:
        while (most := min(limit, free, queues.limits.claim_limit)) > 0:
            claim = queues.claim(letter_queue, ttl=300, grace=60, limit=most, wait=2)  # else SQS overlooks some
            if not claim:
                break
            held.append(claim)
            free -= len(claim.messages)
            for letter in [message for message in claim.messages if is_letter(message.body)]:
                (new_id,) = queues.post(request_queue, [letter.body["body"]], ttl=ttl)
                tell(letter.body["request_id"], new_id)
                queues.settle(claim, [Settlement(letter)])
                limit -= 1
        return sum(len(claim.messages) for claim in held)
    finally:
        for claim in held:
            with suppress(QueuesError):  # else they are free when their claims end
                if claim.messages:
                    queues.release(claim)


def delete_oldest(queues: Queues, queue: str, number: int) -> None:
    """Delete the oldest messages, except those that a claim holds. Raises ConfigError unless limits.can_browse."""
    after = ""
    while number > 0:
        page, after = queues.browse(queue, after=after, limit=min(number, PAGE))
        if not page:
            return
        queues.delete(queue, [message.id for message in page])
        number -= len(page)
