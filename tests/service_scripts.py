"""The queue services as the scripts see them: a URL and an environment, with a proxy that fails as a test decides.

def test_something(service):                             # the fixture below; a test for each service
    service.queues.post(service.request_queue, ...)      # straight at the server: neither counted nor failing
    with service.script("widget_consumer.py") as running:
    service.fail({"claim"}, Reply(503))                  # until service.mend()
    service.asked("delete")                              # what the scripts asked of the service
    service.advance(61)                                  # the service's clock, not the scripts'
"""

import os
import time
import uuid
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import apsw
import backend_sqs
import backend_zaqar
import processes
import pytest
from backend_cloud_queues import cloud_queues, zaqar_url
from backend_zaqar import zaqar_mongodb
from fault_proxy import FaultProxy
from identity_double import REGION, IdentityDouble
from keyring_double import USER
from keystone_double import KeystoneDouble
from scripted_maker import Raw, Reply, Request, ScriptedMaker
from support import HERE, Script, run_script, script

from claim_queues import Queues, open_queues
from claim_queues.sqlite import SqliteQueues
from claim_queues.sqs import SqsQueues
from claim_queues.zaqar_api import ZaqarApi
from delivery import Maker
from receive_counts import ReceiveCounts
from widget_consumer import Consumer, Settings

CLAIM_TTL_S = 60
"""Of the consumers that script() and consumer() start: the shortest that the scripts take."""
ALL = frozenset({"claim", "renew", "release", "post", "delete", "look"})
"""Kinds of requests that concern a queue. look: whether a queue exists, how many messages it holds, its settings."""
WIDGET_ID = "{:08x}-54f4-11e5-ad75-3c970e65f731"


class Service:
    """A service with three queues of this test alone.

    queues: for the test's own use. proxy: between the scripts and the server, None where there is no wire.
    failed, failed_at: the requests that fail() answered, and their monotonic times. refused: how the service refuses
    credentials.
    """

    refused = Reply(401, "Authentication required")

    def __init__(self, directory: Path, queues: Queues, proxy: FaultProxy | None = None) -> None:
        test = uuid.uuid4().hex[:12]
        self.directory = directory
        self.queues = queues
        self.proxy = proxy
        self.request_queue, self.response_queue, self.dead_letter_queue = (
            f"{name}-{test}" for name in ("request", "response", "dead-letter")
        )
        self.failed: list[Request] = []
        self.failed_at: list[float] = []
        self.env = {
            "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE / "tests"))),
            "PYTHON_KEYRING_BACKEND": "keyring_double.Keyring",
            "WIDGET_QUEUE_URL": self.url,
            "WIDGET_REQUEST_QUEUE": self.request_queue,
            "WIDGET_RESPONSE_QUEUE": self.response_queue,
            "WIDGET_DEAD_LETTER_QUEUE": self.dead_letter_queue,
        }
        self.mend()

    @property
    def url(self) -> str:
        """What the scripts are given as --queue-url."""
        raise NotImplementedError

    @property
    def names(self) -> tuple[str, str, str]:
        return self.request_queue, self.response_queue, self.dead_letter_queue

    def create(self) -> None:
        """Make the three queues."""
        for name in self.names:
            self.queues.create(name)

    def delete(self, queue: str) -> None:
        """Delete the queue itself, as only an operator does."""
        raise NotImplementedError

    def advance(self, seconds: float) -> None:
        """Let that much time pass for the service alone."""
        raise NotImplementedError

    def end_claims(self) -> None:
        """Let the claim TTL of every claim pass."""
        self.advance(CLAIM_TTL_S + 1)

    # Scripts

    def run(self, name: str, *options: object, stdin: str = "", env: dict[str, str] | None = None) -> Any:
        """Run a script to its end: an object with returncode, stdout and stderr."""
        return run_script(name, *options, cwd=self.directory, env=self.env | (env or {}), stdin=stdin)

    def script(self, name: str, *options: object) -> AbstractContextManager[Script]:
        return script(name, *options, cwd=self.directory, env=self.env)

    def consumer(self, maker: ScriptedMaker, *options: object) -> AbstractContextManager[Script]:
        """A consumer as a process, with the shortest claim TTL and waits."""
        short = ["--claim-ttl", CLAIM_TTL_S, "--poll-interval", 1]
        return self.script("widget_consumer.py", "--maker-url", maker.url, *short, *options)

    @contextmanager
    def consumer_here(
        self, maker_url: str, *, deadline: float = 20.0, opened: Queues | None = None, **options: Any
    ) -> Iterator[Consumer]:
        """A consumer in this process, not running yet. opened: what it uses of the service (default: opened here)."""
        settings: dict[str, Any] = {
            "request_queue": self.request_queue,
            "response_queue": self.response_queue,
            "dead_letter_queue": self.dead_letter_queue,
            "create": False,
            "claim_ttl": CLAIM_TTL_S,
            "grace": 60,
            "claim_limit": self.queues.limits.claim_limit,
            "slots": 8,
            "post_batch": 1,
            "max_receives": 5,
            "poll_interval": 1.0,
            "response_ttl": None if self.queues.limits.message_ttl is None else 86_400,
            "drain": False,
        }
        with opened or open_queues(self.url) as queues:
            counts = ReceiveCounts(None, "", counted_by_service=queues.limits.counts_receives)
            maker = Maker(maker_url, deadline_s=deadline)
            yield Consumer(queues, maker, counts, Settings(**settings | options))

    # What is in the queues

    def submit(self, count: int, first: int = 0) -> list[str]:
        """Post so many requests, straight at the server; gives their widget ids."""
        ids = [WIDGET_ID.format(number) for number in range(first, first + count)]
        self.queues.post(self.request_queue, [{"widget_id": id_} for id_ in ids], ttl=self._ttl)
        return ids

    def left(self) -> tuple[int, int]:
        """Requests and dead letters that are left, claimed ones included."""
        return self.queues.stats(self.request_queue).total, self.queues.stats(self.dead_letter_queue).total

    def count_responses(self) -> int:
        return self.queues.stats(self.response_queue).total

    def take(self, queue: str) -> list[Any]:
        """The bodies of all messages that are free; they are claimed, and stay so."""
        grace, limit = 60 if self.queues.limits.grace else 0, self.queues.limits.claim_limit
        found: list[Any] = []
        while claim := self.queues.claim(queue, ttl=600, grace=grace, limit=limit):
            found += [message.body for message in claim.messages]
        return found

    def outcomes(self) -> dict[str, str]:
        """The outcome by widget id; a response that is repeated must say the same, under the same response id.

        Responses are taken by this: call it once.
        """
        responses = self.take(self.response_queue)
        said = {(each["request_id"], each["response_id"], each["widget_id"], each["outcome"]) for each in responses}
        assert len(said) == len({request_id for request_id, *_ in said}), responses
        assert len(responses) == len(said) or not self.queues.limits.atomic_settle
        return {widget_id: outcome for *_, widget_id, outcome in said}

    # The wire

    def kind(self, request: Request) -> str:
        """Which of ALL the request is."""
        method, path = request.method, request.path.partition("?")[0].strip("/").split("/")
        what = next((part for part in path[3:] if part in ("claims", "messages")), "")
        kinds = {
            ("POST", "claims"): "claim",
            ("PATCH", "claims"): "renew",
            ("DELETE", "claims"): "release",
            ("POST", "messages"): "post",
            ("DELETE", "messages"): "delete",
        }
        return kinds.get((method, what), "look")

    def concerns(self, request: Request, queue: str) -> bool:
        """Whether the request is for that queue."""
        return queue in request.path

    def asked(self, kind: str) -> list[Request]:
        """The requests of that kind that came from the scripts."""
        return [request for request in self.wire.requests if self.kind(request) == kind]

    @property
    def wire(self) -> FaultProxy:
        if self.proxy is None:
            pytest.skip(f"{self.queues.limits.service} has no wire")
        return self.proxy

    def serve(self, request: Request) -> Reply:
        """What the service answers."""
        return self.wire.forward(request)

    def lose(self, request: Request) -> Raw:
        """Do what is asked, and lose the answer."""
        self.serve(request)
        return Raw(end="reset")

    def fail(
        self, kinds: Collection[str], answer: Reply | Raw | Callable[[Request], Reply | Raw], *, times: int = 10**6
    ) -> None:
        """Answer the next `times` requests of these kinds so; serve all others."""
        self.failed, self.failed_at = [], []
        left = iter(range(times))

        def decide(request: Request) -> Reply | Raw:
            if self.kind(request) not in kinds or next(left, None) is None:
                return self.serve(request)
            self.failed.append(request)
            self.failed_at.append(time.monotonic())
            return answer(request) if callable(answer) else answer

        self.wire.answer = decide

    def mend(self) -> None:
        """Serve everything again."""
        if self.proxy:
            self.proxy.answer = self.serve

    @contextmanager
    def down(self) -> Iterator[None]:
        """Nothing listens at the service's port until the block ends."""
        before = self.wire
        before.__exit__(None, None, None)
        yield
        self.proxy = FaultProxy(before.target, port=before.port)
        self.proxy.__enter__()
        self.mend()

    def __enter__(self) -> Self:
        if self.proxy:
            self.proxy.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.proxy:
            self.proxy.__exit__(kind, error, traceback)

    @property
    def _ttl(self) -> int | None:
        return None if self.queues.limits.message_ttl is None else 3600


class Embedded(Service):
    """Time passes by bringing the ends of all claims and delays nearer."""

    @property
    def url(self) -> str:
        return f"sqlite:///{self.directory / 'queues.sqlite3'}"

    def advance(self, seconds: float) -> None:
        # Not by sqlite3: a second SQLite in this process would not see the locks of apsw's.
        with closing(apsw.Connection(str(self.directory / "queues.sqlite3"))) as file:
            file.set_busy_timeout(10_000)
            file.execute(
                "UPDATE messages SET held_until = max(1, held_until - ?) WHERE held_until > 0", (int(seconds * 1000),)
            )


class OverZaqarApi(Service):
    """What the services have in common that speak Zaqar's API."""

    queues: ZaqarApi

    def delete(self, queue: str) -> None:
        self.queues._ask("delete", queue, "DELETE")


class CloudQueues(OverZaqarApi):
    """identity: gives the tokens that the proxy takes."""

    def __init__(self, directory: Path, queues: Queues, proxy: FaultProxy, identity: IdentityDouble) -> None:
        self.identity = identity
        super().__init__(directory, queues, proxy)

    @property
    def url(self) -> str:
        return f"rackspace://{USER}@{REGION}?identity={self.identity.url}"

    def advance(self, seconds: float) -> None:
        processes.advance(zaqar_url(), seconds)

    def serve(self, request: Request) -> Reply:
        return super().serve(request) if self.identity.holds(request) else self.refused


class Zaqar(OverZaqarApi):
    """keystone: gives the tokens that the proxy takes."""

    def __init__(self, directory: Path, queues: Queues, proxy: FaultProxy, keystone: KeystoneDouble) -> None:
        self.keystone = keystone
        super().__init__(directory, queues, proxy)
        keystone.write_clouds(directory / "clouds.yaml")
        self.env["OS_CLIENT_CONFIG_FILE"] = str(directory / "clouds.yaml")

    @property
    def url(self) -> str:
        return "zaqar://mine"

    def advance(self, seconds: float) -> None:
        processes.advance(backend_zaqar.mongodb_server(), seconds)

    def kind(self, request: Request) -> str:
        """Also the list of versions, which is shown to everyone, also to those whose credentials are refused."""
        return "versions" if request.path == "/" else super().kind(request)

    def serve(self, request: Request) -> Reply:
        admitted = self.keystone.admit(request)
        return super().serve(admitted) if admitted else self.refused


class Sqs(Service):
    """The server's clock goes back in the end: SQS tells when a message was sent, and its ages are by our clock."""

    queues: SqsQueues
    ahead_s = 0.0
    refused = Reply(403, {"__type": "com.amazon.coral.service#InvalidClientTokenId", "message": "said AWS"})

    @property
    def url(self) -> str:
        return f"sqs://{backend_sqs.REGION}?endpoint={self.wire.url}"

    def advance(self, seconds: float) -> None:
        processes.advance(backend_sqs.server(), seconds)
        self.ahead_s += seconds

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.advance(-self.ahead_s)

    def delete(self, queue: str) -> None:
        self.queues._client.delete_queue(QueueUrl=self.queues._url(queue))

    def concerns(self, request: Request, queue: str) -> bool:
        return queue in (request.json.get("QueueUrl") or request.json["QueueName"])

    def end_claims(self) -> None:
        """Refuses the next renewal as AWS does; moto renews what nobody has received since."""
        super().end_claims()
        self.fail({"renew"}, self.not_in_flight, times=1)

    def not_in_flight(self, request: Request) -> Reply:
        """Refuse each entry of a batch, as for a message that is free again."""
        code = "AWS.SimpleQueueService.MessageNotInflight"
        failed = [
            {"Id": entry["Id"], "Code": code, "SenderFault": True, "Message": "said AWS"}
            for entry in request.json["Entries"]
        ]
        return Reply(200, {"Failed": failed})

    def kind(self, request: Request) -> str:
        operation = request.headers["X-Amz-Target"].removeprefix("AmazonSQS.")
        if operation == "ChangeMessageVisibilityBatch":
            renews = all(entry["VisibilityTimeout"] == CLAIM_TTL_S for entry in request.json["Entries"])
            return "renew" if renews else "release"
        kinds = {"ReceiveMessage": "claim", "SendMessageBatch": "post", "DeleteMessageBatch": "delete"}
        return kinds.get(operation, "look")


@contextmanager
def embedded(directory: Path) -> Iterator[Service]:
    with SqliteQueues(directory / "queues.sqlite3") as queues:
        yield Embedded(directory, queues)


@contextmanager
def rackspace(directory: Path) -> Iterator[Service]:
    proxy = FaultProxy(zaqar_url())
    with (
        cloud_queues(directory) as server,
        IdentityDouble(f"{proxy.url}/v1") as identity,
        CloudQueues(directory, server.queues, proxy, identity) as service,
    ):
        yield service


@contextmanager
def zaqar(directory: Path) -> Iterator[Service]:
    proxy = FaultProxy(backend_zaqar.mongodb_server())
    with (
        zaqar_mongodb(directory) as server,
        KeystoneDouble(proxy.url, project="contract") as keystone,
        Zaqar(directory, server.queues, proxy, keystone) as service,
    ):
        yield service


@contextmanager
def sqs(directory: Path) -> Iterator[Service]:
    proxy = FaultProxy(backend_sqs.server())
    with backend_sqs.sqs(directory) as server, Sqs(directory, server.queues, proxy) as service:
        yield service


SERVICES: dict[str, Callable[[Path], AbstractContextManager[Service]]] = {
    "embedded": embedded,
    "cloud-queues": rackspace,
    "zaqar-mongodb": zaqar,
    "sqs": sqs,
}
"""By the name that test ids show; the xdist groups have these names too, as in the contract suite."""


def parameters(*names: str) -> list[Any]:
    """Parameters of the fixture `service`; each service's tests run in one process, which starts its server once."""
    return [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in names]


over_a_wire = pytest.mark.parametrize("service", parameters("cloud-queues", "zaqar-mongodb", "sqs"), indirect=True)
"""For tests of what only a service can do that is reached by HTTP."""
