#!/usr/bin/env python3
"""Submit requests that create widgets, and optionally wait for their outcomes.

The producer does not judge widget ids: the maker does, and sending a bad one must be possible.
"""

import json
import secrets
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, BinaryIO

import click
from rich.console import Console
from rich.progress import Progress

from claim_queues import JSON, ConfigError, PostIncomplete, Queues, QueuesError, QueueUnavailable
from claim_queues.cli import (
    GIVEN,
    MESSAGE_SECONDS,
    Command,
    as_line,
    is_terminal,
    note,
    opened,
    print_lines,
    queue_options,
)

MOST_BODY_BYTES = 65_536
PAGE, LOOK_S, LOOK_AGAIN_S, HINT_AFTER_S = 1000, 1.0, 0.5, 3.0


def random_ids(count: int) -> Iterator[str]:
    """UUIDs of version 1 that reveal nothing about this machine: their node is random, as its multicast bit says."""
    node, clock_seq = secrets.randbits(48) | 1 << 40, secrets.randbits(14)
    return (str(uuid.uuid1(node, clock_seq)) for _ in range(count))


def read_ids(file: BinaryIO) -> Iterator[str]:
    """The ids in the file, one per line; blank lines are skipped. Raises ConfigError where it is not UTF-8 text."""
    lines = iter(lambda: file.readline(MOST_BODY_BYTES + 1), b"")  # a file without line ends must not fill the memory
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                yield line.decode("utf-8-sig").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ConfigError(f"--ids-file, line {number:,}: is not UTF-8 text") from error


def request(widget_id: str) -> dict[str, JSON]:
    """The request that creates the widget. Raises ConfigError where it is too long to be sent."""
    body = {"widget_id": widget_id}
    if len(json.dumps(body)) > MOST_BODY_BYTES:
        raise ConfigError(f"widget id {as_line(widget_id)}: its request would have over {MOST_BODY_BYTES:,} bytes")
    return body


def post_all(
    queues: Queues, queue: str, ids: Iterator[str], ttl: int | None, report: Callable[[dict[str, str]], None]
) -> None:
    """Post a request for each widget id, batch by batch; report each batch as soon as it is stored.

    report: takes widget ids by message id. Raises PostIncomplete where only some, or perhaps only some, are stored.
    """
    posted, batch = 0, list[str]()
    try:
        while batch := list(islice(ids, queues.limits.post_limit)):
            message_ids = queues.post(queue, [request(widget_id) for widget_id in batch], ttl=ttl)
            report(dict(zip(message_ids, batch, strict=True)))
            posted, batch = posted + len(batch), []
    except PostIncomplete as error:
        for index, reason in error.refused.items():
            note(as_line("not stored:", batch[index], reason))
        for index in error.unknown:
            note(as_line("perhaps stored:", batch[index]))
        report({message_id: batch[index] for index, message_id in error.accepted.items()})
        raise
    except (KeyboardInterrupt, SystemExit):  # raised by a signal
        for widget_id in batch:
            note(as_line("perhaps stored:", widget_id))
        raise
    except QueuesError as error:
        if not posted:
            raise
        message = f"stored the first {posted:,} requests and no more: {error}"
        raise PostIncomplete(message, accepted={}, refused={}, unknown=()) from error


def await_responses(
    queues: Queues, queue: str, pending: dict[str, str], timeout: float
) -> Iterator[tuple[str, dict[str, JSON]]]:
    """Yield widget id and first response of each pending request, until none is pending or `timeout` seconds are over.

    pending: widget ids by message id; answered requests are removed from it. Their responses are deleted, others stay.
    """
    ours, marker, deadline = set(pending), "", time.monotonic() + timeout
    hint_at: float | None = deadline - timeout + HINT_AFTER_S
    while pending and (left := deadline - time.monotonic()) > 0:
        if hint_at and time.monotonic() > hint_at and len(pending) == len(ours):
            note(f"no response yet in {queue}: is a consumer running? Waiting up to {left:.0f} s more")
            hint_at = None
        try:
            page, marker = queues.browse(queue, after=marker, limit=PAGE, wait=min(left, LOOK_S))
            objects = [message for message in page if isinstance(message.body, dict)]
            found = [message for message in objects if str(message.body.get("request_id")) in ours]
            for message in found:
                id_ = str(message.body["request_id"])
                if id_ in pending:  # a crash of a consumer can repeat a response
                    yield pending[id_], message.body
                    del pending[id_]
            if found:
                queues.delete(queue, [message.id for message in found])
        except QueueUnavailable as error:  # a response whose delete failed expires later
            time.sleep(min(left, max(LOOK_AGAIN_S, error.retry_after)))


@click.command(cls=Command, examples=["--widget-id not-a-uuid --wait", "--count 1000 --json > submitted.jsonl"])
@queue_options("request", "response")
@click.option("--widget-id", metavar="ID", multiple=True, help="Id of the widget; may be repeated.  [default: random]")
@click.option("--count", type=click.IntRange(1, 100_000_000), help="Submit this many requests with random v1 UUIDs.")
@click.option("--ids-file", type=click.File("rb"), metavar="FILE", help="File with an id on each line; `-` is stdin.")
@click.option("--ttl", type=MESSAGE_SECONDS, default=3600, help="Seconds that a request may wait to be received.")
@click.option("--wait", is_flag=True, help="Wait for each request's outcome; print WIDGET_ID OUTCOME [REASON].")
@click.option("--timeout", type=click.FloatRange(0.1, 1_209_600), default=60.0, help="Seconds to wait with --wait.")
@click.option("--json", "as_json", envvar="WIDGET_JSON", is_flag=True, help="Print JSON lines.")
def cli(*, wait: bool, as_json: bool, **given: Any) -> int:
    """Submit requests that create widgets; print MESSAGE_ID WIDGET_ID for each one that is stored.

    Exit codes: 0 all stored (with --wait: all created), 1 failed (with --wait: not all created), 2 usage, 3 the wait
    timed out, 4 credentials, 5 a local file cannot be used, 6 only some requests were stored, or that is unknown.
    """
    if not wait and click.get_current_context().get_parameter_source("timeout") in GIVEN:
        raise ConfigError("--timeout: there is nothing to wait for without --wait")
    widget_ids, count, ids_file = given["widget_id"], given["count"], given["ids_file"]
    if sum(map(bool, (widget_ids, count, ids_file))) > 1:
        raise ConfigError("give only one of --widget-id, --count and --ids-file")
    ids = read_ids(ids_file) if ids_file else iter(widget_ids or random_ids(count or 1))
    total = None if ids_file else len(widget_ids) or count or 1
    requests, responses = given["request_queue"], given["response_queue"]
    pending, outcomes = dict[str, str](), set[str]()
    console, is_hidden = Console(stderr=True), total == 1 or not is_terminal(sys.stderr)
    progress = Progress(console=console, transient=True, redirect_stdout=sys.stdout.isatty(), disable=is_hidden)

    def report(stored: dict[str, str]) -> None:
        if wait:
            pending.update(stored)
        elif as_json:
            print_lines(json.dumps({"message_id": id_, "widget_id": widget}) for id_, widget in stored.items())
        else:
            print_lines(as_line(id_, widget) for id_, widget in stored.items())
        progress.advance(task, len(stored))

    with opened(given, requests, *([responses] if wait else [])) as queues, progress:
        ttl = given["ttl"] if queues.limits.has_message_ttl else None
        task = progress.add_task("requests", total=total)
        try:
            post_all(queues, requests, ids, ttl, report)
            progress.reset(task, total=len(pending), description="responses", visible=wait)
            for widget_id, response in await_responses(queues, responses, pending, given["timeout"]):
                words = as_line(widget_id, response.get("outcome"), response.get("reason") or "").rstrip()
                print_lines([json.dumps(response) if as_json else words])
                outcomes.add(str(response.get("outcome")))
                progress.advance(task)
        finally:
            for message_id, widget_id in pending.items():  # so that every stored request is reported
                note(as_line("no response yet:", message_id, widget_id))
    if pending:
        silent = f"{len(pending):,} without a response after {given['timeout']:g} s, still queued"
        note(f"error: {silent}: is a consumer running?")
        return 3
    return 0 if outcomes <= {"created"} else 1


if __name__ == "__main__":
    cli()
