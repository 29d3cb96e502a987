"""Start the maker and the consumer, submit requests, show their outcomes, and stop everything.

All files lie in a temporary directory and the maker takes a free port, so nothing of the user's is touched.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import requests

HERE = Path(__file__).resolve().parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("WIDGET_")}
KNOWN_ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
INVALID_ID = "this_is_not_a_valid_widget_id"
RANDOM_REQUESTS = 20
PATIENCE_S = 15.0


@contextmanager
def running(directory: Path, script: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a script until the block ends; its log goes to the directory."""
    with (directory / f"{script}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, HERE / script, *options], stdout=log, stderr=log, env=ENVIRONMENT)
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_S)
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_until_healthy(url: str, maker: subprocess.Popen[bytes], directory: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while maker.poll() is None and time.monotonic() < deadline:
        with suppress(requests.RequestException):
            if requests.get(url, timeout=1).status_code == requests.codes.ok:
                return
        time.sleep(0.05)
    sys.exit((directory / "widget_maker.py.log").read_text() or "the maker did not start")


def submit(directory: Path, queue_url: str) -> list[dict[str, object]]:
    """Submit the requests, wait, and return the responses."""
    ids = [str(uuid.uuid1()) for _ in range(RANDOM_REQUESTS)] + [INVALID_ID, KNOWN_ID, KNOWN_ID]
    (directory / "ids").write_text("\n".join(ids) + "\n")
    options = ["--ids-file", directory / "ids", "--wait", "--json", "--timeout", str(PATIENCE_S)]
    producer = subprocess.run(
        [sys.executable, HERE / "widget_producer.py", "--queue-url", queue_url, *options],
        stdout=subprocess.PIPE,
        env=ENVIRONMENT,
        check=False,
    )
    return [json.loads(line) for line in producer.stdout.splitlines()]


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        directory, port = Path(temporary), free_port()
        queue_url = f"sqlite:///{directory / 'queues.sqlite3'}"
        print(f"widget_maker.py     makes widgets at http://127.0.0.1:{port}/")
        options = ["--port", str(port), "--database", f"{directory / 'widgets'}"]
        with running(directory, "widget_maker.py", *options) as maker:
            wait_until_healthy(f"http://127.0.0.1:{port}/healthz", maker, directory)
            print(f"widget_consumer.py  takes requests to it from {queue_url}")
            options = ["--queue-url", queue_url, "--maker-url", f"http://127.0.0.1:{port}/widgets"]
            with running(directory, "widget_consumer.py", *options, "--receive-counts", f"{directory / 'counts'}"):
                print(f"widget_producer.py  submits {RANDOM_REQUESTS} random ids, an invalid one, a known one twice\n")
                responses = submit(directory, queue_url)
    table = Counter(describe(response) for response in responses)
    print(f"{'requests':>8}  outcome")
    for outcome, number in sorted(table.items()):
        print(f"{number:8}  {outcome}")
    return 0 if len(responses) == RANDOM_REQUESTS + 3 else 1


def describe(response: dict[str, object]) -> str:
    if response["outcome"] == "created":
        return "created" if response["status"] == requests.codes.created else "created: was already there"
    return f"{response['outcome']}: {response['reason']}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: everything is stopped")
