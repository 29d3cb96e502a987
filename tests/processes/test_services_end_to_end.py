"""The three scripts on each queue service that is reached over a wire, as on the embedded one."""

import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from doubles.identity_double import IdentityDouble
from doubles.scripted_maker import Post, Reply, ScriptedMaker
from support import HERE, Script, free_port, run_script, script, wait_until, widget_maker, widgets

from claim_queues import Claim, Queues, open_queues

BAD_IDS = [f"this_is_not_a_valid_widget_id_{number}" for number in range(3)]


class Place:
    """A service with three queues of this test alone. queues: for the test's own use."""

    def __init__(self, directory: Path, url: str, queues: Queues) -> None:
        self.directory = directory
        self.queues = queues
        self.names = [f"{kind}-{uuid.uuid4().hex[:12]}" for kind in ("request", "response", "dead-letter")]
        settings = ("WIDGET_REQUEST_QUEUE", "WIDGET_RESPONSE_QUEUE", "WIDGET_DEAD_LETTER_QUEUE")
        self.env = dict(zip(settings, self.names, strict=True))
        self.env |= {"WIDGET_QUEUE_URL": url, "PYTHONPATH": f"{HERE}:{HERE / 'tests'}"}

    def run(self, name: str, *options: object, stdin: str = "") -> Any:
        return run_script(name, *options, cwd=self.directory, env=self.env, stdin=stdin)

    @contextmanager
    def consumer(self, maker_url: str, *options: object) -> Iterator[Script]:
        usual: list[object] = ["--maker-url", maker_url, "--poll-interval", 1, "--log-format", "json"]
        usual += ["--log-level", "debug", "--receive-counts", "counts.sqlite3"]
        with script("widget_consumer.py", *usual, *options, cwd=self.directory, env=self.env) as running:
            yield running

    def finish(self, consumer: Script, responses: int) -> None:
        """End it once that is done which there was to do: a drain takes a minute where counts are not exact."""
        requests, outcomes, _ = self.names

        def is_done() -> bool:
            return self.queues.stats(outcomes).total >= responses and not self.queues.stats(requests).total

        wait_until(lambda: consumer.process.poll() is not None or consumer.events("consuming"))
        wait_until(lambda: consumer.process.poll() is not None or is_done(), 60)
        consumer.signal(signal.SIGTERM)
        assert consumer.exit_code() == 0, consumer.err

    def outcomes(self) -> dict[str, str]:
        """By widget id; a response that is repeated must have the same id. It takes them: call it once."""
        terms = {"ttl": 600, "grace": 60, "limit": self.queues.limits.claim_limit}
        found: list[dict[str, Any]] = []
        while claim := self.queues.claim(self.names[1], **terms):
            found += [message.body for message in claim.messages]
        said = {(each["request_id"], each["response_id"], each["widget_id"], each["outcome"]) for each in found}
        assert len(said) == len({request_id for request_id, *_ in said}), found
        return {widget_id: outcome for *_, widget_id, outcome in said}


@contextmanager
def rackspace() -> Iterator[str]:
    from backend_cloud_queues import zaqar_url  # each of these skips where the service's SDK is missing

    with IdentityDouble(f"{zaqar_url()}/v1") as identity, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHON_KEYRING_BACKEND", "doubles.keyring_double.Keyring")
        yield identity.queue_url


@contextmanager
def zaqar() -> Iterator[str]:
    import backend_zaqar

    yield f"zaqar://?endpoint={quote(backend_zaqar.mongodb_server(), safe='')}&project=widgets"


@contextmanager
def sqs() -> Iterator[str]:
    import backend_sqs

    with backend_sqs.credentials():
        yield f"sqs://{backend_sqs.REGION}?endpoint={backend_sqs.server()}"


SERVICES = {"cloud-queues": rackspace, "zaqar-mongodb": zaqar, "sqs": sqs}


@pytest.fixture(params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SERVICES])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with SERVICES[request.param]() as url, open_queues(url) as queues:
        yield Place(tmp_path, url, queues)


def test_each_widget_is_made_once_and_each_request_answered(place: Place, tmp_path: Path) -> None:
    good = [str(uuid.uuid1()) for _ in range(27)]
    ids = [id_ for start in range(3) for id_ in (BAD_IDS[start], *good[start::3])]

    missing = place.run("widget_producer.py")
    submitted = place.run("widget_producer.py", "--ids-file", "-", "--create", stdin="\n".join(ids))
    port = free_port()
    with (
        widget_maker(tmp_path, "--fail-rate", 1, port=port) as (url, failing),
        place.consumer(f"{url}/widgets", "--max-receives", 20, "--create") as consumer,
    ):
        wait_until(lambda: consumer.events("failed, comes back"))
        failing.kill()
        with widget_maker(tmp_path, port=port):
            place.finish(consumer, 30)
            made = widgets(url)

    assert (missing.returncode, missing.stdout, missing.stderr.count("\n")) == (1, "", 1)
    assert "--create" in missing.stderr
    assert submitted.returncode == 0, submitted.stderr
    assert [line.split()[1] for line in submitted.stdout.splitlines()] == ids
    assert sorted(made) == sorted(good)
    assert place.outcomes() == dict.fromkeys(good, "created") | dict.fromkeys(BAD_IDS, "rejected")
    assert place.queues.stats(place.names[2]).total == 0
    assert "Traceback" not in consumer.err


@pytest.mark.parametrize("place", [pytest.param("sqs", marks=pytest.mark.xdist_group("sqs"))], indirect=True)
def test_what_others_received_is_not_charged(place: Place) -> None:
    ids = [f"w{number}" for number in range(3)]
    for name in place.names:
        place.queues.create(name)
    place.queues.post(place.names[0], [{"widget_id": id_} for id_ in ids])
    for _ in range(6):  # as consumers of other machines do in an outage, and people who only look
        claims: list[Claim] = []
        while sum(len(claim.messages) for claim in claims) < len(ids):
            found = place.queues.claim(place.names[0], ttl=60, grace=60, limit=10, wait=2)
            claims += [found] if found else []
        for claim in claims:
            place.queues.release(claim)

    def fail_once(post: Post) -> Reply | int:
        return 500 if len(maker.posts_of(post.widget_id)) == 1 else maker.make(post)

    with ScriptedMaker() as maker:
        maker.answer = fail_once
        with place.consumer(maker.url, "--max-receives", 2) as consumer:
            place.finish(consumer, 3)

    assert place.outcomes() == dict.fromkeys(ids, "created")
