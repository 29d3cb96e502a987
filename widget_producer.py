#!/usr/bin/env python3
"""Submit requests that create widgets, and optionally wait for what became of them.

The producer does not judge widget ids: the maker does, and sending a bad one must be possible.
"""

import json
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import click
from tqdm import tqdm

from claim_queues import JSON, ConfigError, PostIncomplete, Queues, QueuesError, QueueUnavailable, open_queues
from claim_queues.command_line import (
    SETTINGS,
    Number,
    WholeNumber,
    __version__,
    distinct,
    one_line,
    option,
    queue_options,
    require_queues,
    run,
)

MOST_BODY_BYTES = 65_536
LOOK_EVERY_S = 2.0
RETRY_LOOK_S = 0.5
EXIT_NOT_CREATED, EXIT_TIMED_OUT = 1, 3


class Waiter:
    """Collects the responses to this producer's own requests; deletes those, and leaves all others alone."""

    def __init__(self, queues: Queues, response_queue: str) -> None:
        self._queues = queues
        self._response_queue = response_queue
        self._marker = queues.end_marker(response_queue)
        self.pending: dict[str, str] = {}

    def expect(self, request_id: str, widget_id: str) -> None:
        """Wait for the response to this request too."""
        self.pending[request_id] = widget_id

    def responses(self, timeout: float) -> Iterator[dict[str, JSON]]:
        """Each pending request's response, once, as it comes, until all are there or `timeout` seconds are over."""
        deadline = time.monotonic() + timeout
        while self.pending and (left := deadline - time.monotonic()) > 0:
            try:
                page = self._queues.browse(self._response_queue, after=self._marker, wait=min(left, LOOK_EVERY_S))
            except QueueUnavailable:
                time.sleep(min(left, RETRY_LOOK_S))
                continue
            self._marker = page.marker
            ours = [message for message in page.messages if self._answers_ours(message.body)]
            for message in ours:
                if self.pending.pop(message.body["request_id"], None) is not None:
                    yield message.body
            if ours:
                self._queues.delete(self._response_queue, [message.id for message in ours])

    def _answers_ours(self, body: JSON) -> bool:
        return (
            isinstance(body, dict) and isinstance(body.get("outcome"), str) and body.get("request_id") in self.pending
        )


def random_ids(count: int) -> Iterator[str]:
    """Random UUIDs, version 1."""
    return (str(uuid.uuid1()) for _ in range(count))


def read_ids(path: str) -> Iterator[str]:
    """The ids in the file, one a line, blank lines left out; `-` is stdin. Raises ConfigError for what is no text."""
    try:
        with click.open_file(path, encoding="utf-8") as lines:
            for line in lines:
                if line.strip():
                    yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is no UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def request(widget_id: str) -> dict[str, JSON]:
    """The request that creates the widget; ConfigError where the id cannot be sent at all."""
    body = {"widget_id": widget_id}
    try:
        size = len(json.dumps(body).encode()) if widget_id.encode() else 0
    except UnicodeEncodeError as error:
        raise ConfigError(f"widget id {one_line(widget_id, 80)}: is no UTF-8 text") from error
    if size > MOST_BODY_BYTES:
        raise ConfigError(
            f"widget id {one_line(widget_id, 80)}: makes a body of {size:,} bytes; at most {MOST_BODY_BYTES:,}"
        )
    return body


def post_all(queues: Queues, queue: str, ids: Iterable[str], *, ttl: int | None) -> Iterator[tuple[str, str]]:
    """Post a request for each widget id; give (message id, widget id) once each is stored.

    Raises PostIncomplete where some are stored and some are not, or may not be.
    """
    ids, posted = iter(ids), 0
    while batch := list(islice(ids, queues.limits.post_batch)):
        try:
            message_ids = queues.post(queue, [request(widget_id) for widget_id in batch], ttl=ttl)
        except PostIncomplete as error:
            yield from ((message_id, batch[index]) for index, message_id in error.accepted.items())
            raise
        except QueuesError as error:
            if posted == 0 or isinstance(error, ConfigError):
                raise
            message = f"posted {posted:,}, then failed at {one_line(batch[0], 80)}: {error}"
            refused = dict.fromkeys(range(len(batch)), str(error))
            raise PostIncomplete(message, accepted={}, refused=refused, unknown=()) from error
        posted += len(batch)
        yield from zip(message_ids, batch, strict=True)


class Output:
    """Lines for programs on stdout, and a progress bar on stderr where that is a terminal."""

    def __init__(self, total: int | None, unit: str) -> None:
        self._bar = tqdm(total=total, unit=unit, file=sys.stderr, disable=None if total != 1 else True, leave=False)

    def line(self, text: str) -> None:
        """Print one line; where stdout fails, on stderr, so that no accepted id goes unreported."""
        try:
            with self._bar.external_write_mode(file=sys.stdout):
                sys.stdout.write(text + "\n")
                if sys.stdout.isatty():
                    sys.stdout.flush()
        except OSError:
            click.echo(text, err=True)
            raise
        self._bar.update()

    def close(self) -> None:
        self._bar.close()
        sys.stdout.flush()


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
@option("--ids-file", metavar="FILE", help="Submit a request for each line of the file; `-` is stdin.")
@option(
    "--ttl", type=WholeNumber(60, 1_209_600, "seconds"), default=3600, help="Seconds a request may wait to be received."
)
@option("--wait", is_flag=True, help="Wait for what becomes of each request; print ID OUTCOME [REASON].")
@option("--timeout", type=Number(0, 1_209_600, "seconds"), default=60.0, help="Seconds to wait with --wait.")
@option("--json", "as_json", is_flag=True, help="Print JSON lines.")
@click.version_option(__version__)
@click.pass_context
def cli(ctx: click.Context, /, **given: Any) -> int:
    """Submit requests that create widgets; print MESSAGE_ID WIDGET_ID for each one that is stored.

    Exit codes: 0 all stored (with --wait: all created), 1 failed (with --wait: not all created), 2 usage,
    3 the wait timed out, 4 credentials, 5 a local file cannot be used, 6 partly stored.
    """
    ids, total = _ids(given["widget_ids"], given["count"], given["ids_file"])
    with open_queues(given["queue_url"]) as queues:
        limits, names = queues.limits, [given["request_queue"]]
        if given["wait"]:
            distinct(given["request_queue"], given["response_queue"])
            names.append(given["response_queue"])
            if not limits.can_browse:
                raise ConfigError(f"--wait: {limits.service} cannot look for one response among others")
        if limits.message_ttl is None and ctx.get_parameter_source("ttl") is not click.core.ParameterSource.DEFAULT:
            raise ConfigError(f"--ttl: {limits.service} has one message TTL for the whole queue")
        require_queues(queues, names, create=given["create"])
        ttl = given["ttl"] if limits.message_ttl else None
        stored = post_all(queues, given["request_queue"], ids, ttl=ttl)
        if given["wait"]:
            return _post_and_wait(Waiter(queues, given["response_queue"]), stored, total, given)
        output = Output(total, " requests")
        try:
            for message_id, widget_id in stored:
                line = {"message_id": message_id, "widget_id": widget_id}
                output.line(json.dumps(line) if given["as_json"] else f"{message_id} {one_line(widget_id)}")
        finally:
            output.close()
    return 0


def _ids(widget_ids: tuple[str, ...], count: int | None, ids_file: str | None) -> tuple[Iterable[str], int | None]:
    """The widget ids to submit, and how many they are where that is known."""
    if bool(widget_ids) + bool(count) + bool(ids_file) > 1:
        raise ConfigError("give only one of --widget-id, --count and --ids-file")
    if ids_file:
        return read_ids(ids_file), None
    if widget_ids:
        return widget_ids, len(widget_ids)
    return random_ids(count or 1), count or 1


def _post_and_wait(waiter: Waiter, stored: Iterable[tuple[str, str]], total: int | None, given: dict[str, Any]) -> int:
    for message_id, widget_id in stored:
        waiter.expect(message_id, widget_id)
    all_created = True
    output = Output(total, " responses")
    try:
        for response in waiter.responses(given["timeout"]):
            all_created &= response["outcome"] == "created"
            words = (response.get("widget_id") or "-", response["outcome"], response.get("reason") or "")
            output.line(json.dumps(response) if given["as_json"] else " ".join(map(one_line, words)).rstrip())
    finally:
        output.close()
    for message_id, widget_id in waiter.pending.items():
        click.echo(f"no response within {given['timeout']:g} s: {message_id} {one_line(widget_id)}", err=True)
    if waiter.pending:
        return EXIT_TIMED_OUT
    return 0 if all_created else EXIT_NOT_CREATED


def main() -> None:
    """Entry point of the command `widget-producer`."""
    run(cli)


if __name__ == "__main__":
    main()
