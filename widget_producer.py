#!/usr/bin/env python3
"""Submit requests that create widgets, and optionally wait for what became of them.

The producer does not judge widget ids: the maker does, and sending a bad one must be possible.
"""

import json
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any, BinaryIO

import click
from click.core import ParameterSource
from tqdm import tqdm

from claim_queues import JSON, ConfigError, Message, PostIncomplete, Queues, QueuesError, QueueUnavailable, open_queues
from claim_queues.command_line import (
    SETTINGS,
    Number,
    WholeNumber,
    __version__,
    distinct,
    message_ttl,
    one_line,
    option,
    queue_options,
    require_queues,
    run,
)
from claim_queues.terminal import is_terminal

MOST_BODY_BYTES = 65_536
LOOK_EVERY_S = 2.0
RETRY_LOOK_S = 0.5
EXIT_NOT_CREATED, EXIT_TIMED_OUT = 1, 3

Stored = list[tuple[str, str]]
"""Message id and widget id of each request that is on the queue."""


class Waiter:
    """Collects the responses to this producer's own requests; deletes those, and leaves all others alone.

    pending: the widget id of each request without a response, by message id; the caller puts it there. Made before the
    first post, so that it looks at newer responses only.
    """

    def __init__(self, queues: Queues, response_queue: str) -> None:
        self._queues = queues
        self._response_queue = response_queue
        self._marker = queues.end_marker(response_queue)
        self._answered: set[str] = set()
        self.pending: dict[str, str] = {}

    def responses(self, timeout: float) -> Iterator[list[tuple[str, dict[str, JSON]]]]:
        """Lists of (widget id, response) as they come, until each request has one or `timeout` seconds are over.

        They are deleted when the next list is asked for: what could not be reported stays.
        """
        deadline = time.monotonic() + timeout
        while self.pending and (left := deadline - time.monotonic()) > 0:
            try:
                page = self._queues.browse(self._response_queue, after=self._marker, wait=min(left, LOOK_EVERY_S))
                self._marker = page.marker
                if ours := [message for message in page.messages if self._is_ours(message.body)]:
                    yield self._take(ours)
                    self._queues.delete(self._response_queue, [message.id for message in ours])
            except QueueUnavailable:  # what a failed delete leaves behind goes when its TTL ends
                time.sleep(min(left, RETRY_LOOK_S))

    def _is_ours(self, body: JSON) -> bool:
        if not isinstance(body, dict) or not isinstance(body.get("outcome"), str):
            return False
        request_id = body.get("request_id")
        return isinstance(request_id, str) and (request_id in self.pending or request_id in self._answered)

    def _take(self, ours: Sequence[Message]) -> list[tuple[str, dict[str, JSON]]]:
        """The responses that are the first to their request; a crash of a consumer can repeat one."""
        first = []
        for message in ours:
            request_id = message.body["request_id"]
            if request_id in self.pending:
                first.append((self.pending.pop(request_id), message.body))
                self._answered.add(request_id)
        return first


def read_ids(lines: BinaryIO) -> Iterator[str]:
    """The ids in the file, one a line, blank lines left out. Raises ConfigError for what is no UTF-8 text."""
    most = MOST_BODY_BYTES + 1  # already too long for a request: a file without line ends must not fill the memory
    found = False
    try:
        for number, line in enumerate(iter(lambda: lines.readline(most), b""), 1):
            if line.strip():
                found = True
                yield _text(line, number)
    except OSError as error:
        raise ConfigError(f"--ids-file: {error.strerror}") from error
    if not found:
        click.echo("the file holds no id: nothing submitted", err=True)


def _text(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8-sig").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"--ids-file, line {number:,}: is no UTF-8 text") from error


def request(widget_id: str) -> dict[str, JSON]:
    """The request that creates the widget; ConfigError where the id cannot be sent at all."""
    body = {"widget_id": widget_id}
    try:
        widget_id.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"widget id {one_line(widget_id, 80)}: is no UTF-8 text: set a locale of UTF-8, such as LC_ALL=C.UTF-8,"
            " or use --ids-file with a file in UTF-8"
        ) from error
    if len(json.dumps(body)) > MOST_BODY_BYTES:
        raise ConfigError(f"widget id {one_line(widget_id, 80)}: makes a body of over {MOST_BODY_BYTES:,} bytes")
    return body


def post_all(
    queues: Queues, queue: str, ids: Iterable[str], *, ttl: int | None, report: Callable[[Stored], None]
) -> None:
    """Post a request for each widget id, batch by batch; report each batch as soon as it is stored.

    Raises PostIncomplete where some are stored and some are not, or may not be.
    """
    ids, posted = iter(ids), 0
    try:
        while batch := list(islice(ids, queues.limits.post_batch)):
            _post_batch(queues, queue, batch, ttl, report)
            posted += len(batch)
    except PostIncomplete:
        raise
    except QueuesError as error:
        if not posted:
            raise
        message = f"stored the first {posted:,} requests and no more: {error}"
        raise PostIncomplete(message, accepted={}, refused={}, unknown=()) from error


def _post_batch(
    queues: Queues, queue: str, batch: list[str], ttl: int | None, report: Callable[[Stored], None]
) -> None:
    bodies = [request(widget_id) for widget_id in batch]
    with interrupt_held():
        try:
            report(list(zip(queues.post(queue, bodies, ttl=ttl), batch, strict=True)))
        except PostIncomplete as error:
            report([(message_id, batch[index]) for index, message_id in error.accepted.items()])
            for index, reason in error.refused.items():
                click.echo(f"not stored: {one_line(batch[index])} {one_line(reason)}", err=True)
            for index in error.unknown:
                click.echo(f"perhaps stored: {one_line(batch[index])}", err=True)
            raise


@contextmanager
def interrupt_held() -> Iterator[None]:
    """Let a Ctrl-C wait for the end of the block, so that what is stored is reported too; a second one ends it."""
    interrupted = False

    def hold(*_: object) -> None:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, usual)

    usual = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if interrupted:
        signal.raise_signal(signal.SIGINT)


def progress(total: int | None, unit: str) -> "tqdm[Any]":
    """A bar with rate and time left on stderr, where that is a terminal and there is more than one to come."""
    hidden = total == 1 or not is_terminal(sys.stderr)
    return tqdm(total=total, unit=f" {unit}", file=sys.stderr, disable=hidden, leave=False)


def print_lines(lines: Sequence[str]) -> None:
    """Print lines for programs on stdout; where that fails, on stderr, so that nothing accepted goes unreported."""
    text = "\n".join(lines)
    try:
        with tqdm.external_write_mode(file=sys.stdout):
            click.echo(text)
    except OSError as error:
        click.echo(text, err=True)
        raise click.ClickException(f"stdout: {error.strerror}: stopped after what stands above") from error


@click.command(context_settings=SETTINGS)
@queue_options("request", "response")
@option(
    "--widget-id",
    "widget_ids",
    metavar="ID",
    multiple=True,
    help="Id of the widget; may be repeated.  [default: a random UUID v1]",
)
@option("--count", type=WholeNumber(1, 100_000_000, "requests"), help="Submit so many requests with random ids.")
@option(
    "--ids-file",
    type=click.File("rb"),
    metavar="FILE",
    help="Submit a request for each line of the file; `-` is stdin.",
)
@option(
    "--ttl", type=WholeNumber(60, 1_209_600, "seconds"), default=3600, help="Seconds a request may wait to be received."
)
@option("--wait", is_flag=True, help="Wait for what becomes of each request; print ID OUTCOME [REASON].")
@option("--timeout", type=Number(0.1, 1_209_600, "seconds"), default=60.0, help="Seconds to wait with --wait.")
@option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> int:
    """Submit requests that create widgets; print MESSAGE_ID WIDGET_ID for each one that is stored.

    Exit codes: 0 all stored (with --wait: all created), 1 failed (with --wait: not all created), 2 usage,
    3 the wait timed out, 4 credentials, 5 a local file cannot be used, 6 partly stored.
    """
    if not given["wait"] and ctx.get_parameter_source("timeout") is not ParameterSource.DEFAULT:
        raise ConfigError("--timeout: there is nothing to wait for without --wait")
    ids, total = _ids(given["widget_ids"], given["count"], given["ids_file"])
    request_queue, response_queue = given["request_queue"], given["response_queue"]
    distinct(request_queue, response_queue)
    with open_queues(given["queue_url"]) as queues:
        if given["wait"] and not queues.limits.can_browse:
            raise ConfigError(f"--wait: {queues.limits.service} cannot look for one response among others")
        ttl = message_ttl(ctx, queues.limits, "ttl")
        names = [request_queue, response_queue] if given["wait"] else [request_queue]
        require_queues(queues, names, create=given["create"])
        post = partial(post_all, queues, request_queue, ids, ttl=ttl)
        if given["wait"]:
            return _post_and_wait(Waiter(queues, response_queue), post, total, given)
        _post_and_print(post, total, as_json=given["as_json"])
    return 0


def _ids(widget_ids: tuple[str, ...], count: int | None, ids_file: BinaryIO | None) -> tuple[Iterable[str], int | None]:
    """The widget ids to submit, and how many they are where that is known."""
    if bool(widget_ids) + (count is not None) + (ids_file is not None) > 1:
        raise ConfigError("give only one of --widget-id, --count and --ids-file")
    if ids_file is not None:
        return read_ids(ids_file), None
    if widget_ids:
        return widget_ids, len(widget_ids)
    return (str(uuid.uuid1()) for _ in range(count or 1)), count or 1


def _post_and_print(post: Callable[..., None], total: int | None, *, as_json: bool) -> None:
    def line(message_id: str, widget_id: str) -> str:
        if as_json:
            return json.dumps({"message_id": message_id, "widget_id": widget_id})
        return f"{message_id} {one_line(widget_id)}"

    def report(stored: Stored) -> None:
        if stored:
            print_lines([line(*ids) for ids in stored])
        bar.update(len(stored))

    with progress(total, "requests") as bar:
        post(report=report)


def _post_and_wait(waiter: Waiter, post: Callable[..., None], total: int | None, given: dict[str, Any]) -> int:
    """Whatever ends this, each stored request is reported: by its response, or on stderr."""

    def line(widget_id: str, response: dict[str, JSON]) -> str:
        if given["as_json"]:
            return json.dumps(response)
        return " ".join(map(one_line, (widget_id, response["outcome"], response.get("reason") or ""))).rstrip()

    def report(stored: Stored) -> None:
        waiter.pending.update(stored)
        bar.update(len(stored))

    all_created = True
    try:
        with progress(total, "requests") as bar:
            post(report=report)
        with progress(len(waiter.pending), "responses") as bar:
            for found in waiter.responses(given["timeout"]):
                if found:
                    print_lines([line(*answered) for answered in found])
                bar.update(len(found))
                all_created &= all(response["outcome"] == "created" for _, response in found)
    finally:
        for message_id, widget_id in waiter.pending.items():
            click.echo(f"no response yet: {message_id} {one_line(widget_id)}", err=True)
    if waiter.pending:
        click.echo(f"error: {len(waiter.pending):,} without a response after {given['timeout']:g} s", err=True)
        return EXIT_TIMED_OUT
    return 0 if all_created else EXIT_NOT_CREATED


def main() -> None:
    """Entry point of the command `widget-producer`."""
    run(cli)


if __name__ == "__main__":
    main()
