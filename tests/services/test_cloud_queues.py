"""Rackspace Cloud Queues against a real Zaqar, API v1, behind a proxy that wants the tokens of an identity service."""

import os
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from backend_cloud_queues import zaqar_url
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from doubles.http_double import LOST, FaultProxy, HttpDouble, Reply, Request
from doubles.identity_double import REGION, IdentityDouble
from doubles.keyring_double import KEY, USER, Keyring, keyring_of
from support import HERE

from claim_queues import (
    ConfigError,
    CredentialsError,
    QueuesError,
    QueueUnavailable,
)
from claim_queues.cloud_queues import CloudQueues


class World(ExitStack):
    """Cloud Queues as Rackspace has them: an identity service, and a queue service that wants its tokens."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        super().__init__()
        self.enter_context(keyring_of(Keyring()))
        self.proxy = self.enter_context(FaultProxy(zaqar_url(), tls=tls))
        self.proxy.answer = self.serve
        self.identity = self.enter_context(IdentityDouble(f"{self.proxy.url}/v1", tls=tls))
        self.queues = self.enter_context(CloudQueues.from_url(self.identity.queue_url))

    def serve(self, request: Request) -> Reply:
        return self.proxy.serve(request) if self.identity.admits(request) else Reply(401)

    def new_queue(self) -> str:
        name = f"unit-{uuid.uuid4().hex}"
        self.queues.create(name)
        self.proxy.requests.clear()
        return name


@pytest.fixture
def world() -> Iterator[World]:
    with World() as world:
        yield world


@pytest.fixture
def queue(world: World) -> str:
    return world.new_queue()


# Requests


def test_a_claim_is_one_request_that_names_client_account_and_token(world: World, queue: str) -> None:
    world.queues.post(queue, [1, 2])
    world.proxy.requests.clear()

    found = world.queues.claim(queue, ttl=60, grace=60, limit=20)

    assert found
    assert len(found.messages) == 2
    (request,) = world.proxy.requests
    assert uuid.UUID(request.headers["Client-ID"])
    assert (request.headers["X-Auth-Project-Id"], request.headers["X-Auth-Token"]) == ("123", *world.identity.tokens)


def test_what_a_partial_post_left_out_is_posted_next(world: World, queue: str) -> None:
    def partly(request: Request) -> Reply:  # as Rackspace's documentation describes it; Zaqar itself does not
        accepted = FaultProxy.serve(world.proxy, Request(request.method, request.path, request.headers, first))
        return Reply(201, accepted.body.replace(b"false", b"true"))

    first = b'[{"ttl":60,"body":0},{"ttl":60,"body":1},{"ttl":60,"body":2}]'
    world.proxy.fail("POST", partly, times=1)

    ids = world.queues.post(queue, list(range(8)))

    stored = world.queues.browse(queue)[0]
    assert [(message.id, message.body) for message in stored] == list(zip(ids, range(8), strict=True))


def test_a_redirect_is_not_followed(world: World, queue: str) -> None:
    with HttpDouble() as elsewhere:
        world.proxy.fail("GET", Reply(307, headers={"Location": elsewhere.url}))
        with pytest.raises(QueuesError, match="HTTP 307"):
            world.queues.stats(queue)
        assert elsewhere.requests == []


def test_no_password_from_netrc_and_no_proxy_of_the_environment_is_used(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login a password b\n")
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")

    assert not world.queues.exists("missing")

    asked = [*world.identity.requests, *world.proxy.requests]
    assert [request.method for request in asked] == ["POST", "HEAD"]
    assert not any("Authorization" in request.headers for request in asked)


# Connections, timeouts, TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate that is signed by itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cloud queues")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    secret = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path = tmp_path_factory.mktemp("tls") / "certificate.pem"
    path.write_bytes(signed.public_bytes(pem) + secret)
    return path


@pytest.fixture
def tls_world(certificate: Path) -> Iterator[World]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with World(context) as world:
        yield world


def test_a_bundle_of_authorities_that_is_not_there_is_named(tls_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "no-such-file.pem")
    with pytest.raises(ConfigError, match=r"no-such-file.*REQUESTS_CA_BUNDLE"):
        tls_world.queues.exists("requests")


# Sign-in


def test_threads_whose_token_was_refused_share_one_sign_in(world: World, queue: str) -> None:
    world.identity.tokens.clear()  # no longer ours
    all_refused = threading.Barrier(4, timeout=20)

    def answer(request: Request) -> Reply:
        if world.identity.admits(request):
            return world.proxy.serve(request)
        all_refused.wait()
        return Reply(401)

    world.proxy.answer = answer
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(world.queues.exists, [queue] * 4))

    assert len(world.identity.requests) == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_refused_key_is_an_error_at_the_start_and_once_it_worked_a_failure_that_may_pass(
    world: World, status: int
) -> None:
    world.identity.answer = lambda request: Reply(status, {"unauthorized": {"message": "no such key"}})
    with pytest.raises(CredentialsError, match=f"no such key.*keyring set pyrax {USER}"):
        world.queues.exists("requests")
    assert len(world.identity.requests) == 1

    world.identity.answer = world.identity.sign_in
    queue = world.new_queue()
    world.identity.answer = lambda request: Reply(status)
    world.identity.tokens.clear()
    with pytest.raises(QueueUnavailable, match="sign-in of tester"):
        world.queues.exists(queue)


def test_a_token_that_is_never_accepted_is_an_error_of_the_credentials(world: World) -> None:
    world.proxy.fail("", Reply(401))
    with pytest.raises(CredentialsError, match="does not accept these credentials"):
        world.queues.exists("requests")
    assert len(world.identity.requests) == 2


HALF = {"access": {"token": {"id": "half", "expires": "2099-12-01T00:00:00Z", "tenant": {"id": "123", "name": "123"}}}}


@pytest.mark.parametrize(
    ("answer", "retry_after"),
    [
        (Reply(429, headers={"Retry-After": "7"}), 7),
        (Reply(413), 0),
        (Reply(500, {"identityFault": {"code": 500, "message": "oops"}}), 0),
        (Reply(200, "<html>welcome to our hotel</html>"), 0),
        (Reply(200, HALF), 0),
        (LOST, 0),
    ],
    ids=["429", "413", "500", "page", "half", "lost"],
)
def test_no_answer_of_the_identity_service_breaks_later_sign_ins(
    world: World, queue: str, answer: Reply, retry_after: int
) -> None:
    world.identity.answer = lambda request: answer
    world.identity.tokens.clear()
    for _ in range(2):
        with pytest.raises(QueueUnavailable) as caught:
            world.queues.stats(queue)
        assert caught.value.retry_after == retry_after

    world.identity.answer = world.identity.sign_in
    assert world.queues.stats(queue).total == 0
    assert {next(iter(request.json["auth"])) for request in world.identity.requests} == {"RAX-KSKEY:apiKeyCredentials"}


def test_a_region_without_cloud_queues_is_named_with_those_that_have_them(world: World) -> None:
    with (
        CloudQueues.from_url(world.identity.queue_url.replace(REGION, "LON")) as queues,
        pytest.raises(ConfigError, match=f"region LON; regions that have: {REGION}"),
    ):
        queues.exists("requests")


# Secrets

PROGRAM = """
import logging, sys, traceback
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout)
from claim_queues import QueuesError, open_queues
for queue in sys.argv[2:]:
    try:
        with open_queues(sys.argv[1]) as queues:
            print(queues, vars(queues), queues.address, queues.credentials)
            queues.create(queue)
            queues.post(queue, [1])
            print(queues.claim(queue, ttl=60, grace=60, limit=1))
    except QueuesError:
        traceback.print_exc(file=sys.stdout)
"""
SLIPS = "[settings]\nhttp_debug = True\nverify_ssl = true\nkeyring_username = tester\n"
"""What pyrax reads in the file: it prints what it sends, keys included, and verifies no certificate."""


def run(home: Path, url: str, *queues: str, settings: str = SLIPS) -> str:
    """What that program says in a process of its own, with the double for a keyring and these settings of pyrax."""
    (home / ".pyrax.cfg").write_text(settings)
    paths = os.pathsep.join(map(str, (HERE, HERE / "tests")))
    env = {name: value for name, value in os.environ.items() if not name.endswith("_CA_BUNDLE")}
    env |= {"PYTHONPATH": paths, "PYTHON_KEYRING_BACKEND": "doubles.keyring_double.Keyring"}
    command = [sys.executable, "-c", PROGRAM, url, *queues]
    ended = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=True)
    return ended.stdout + ended.stderr


def test_no_secret_is_shown_by_any_log_error_or_repr(world: World, queue: str, tmp_path: Path) -> None:
    faults = {"denied": Reply(401), "banned": Reply(403), "busy": Reply(503), "lost": LOST, "page": Reply(200, "<p>")}
    world.proxy.answer = lambda request: faults.get(request.path.split("/")[3]) or world.serve(request)

    out = run(tmp_path, world.identity.queue_url.replace(f"{USER}@", ""), queue, *faults)

    expected = ("Claim(id=", "CredentialsError", "QueueForbidden", "QueueUnavailable", "AnswerLost", "urllib3")
    assert [word for word in expected if word not in out] == []
    assert world.identity.requests[-1].json["auth"]["RAX-KSKEY:apiKeyCredentials"]["apiKey"] == KEY
    assert "canary" not in out


def test_a_slip_in_the_settings_of_pyrax_turns_no_verification_off(tls_world: World, tmp_path: Path) -> None:
    assert "CERTIFICATE_VERIFY_FAILED" in run(tmp_path, tls_world.identity.queue_url, "requests")
    assert tls_world.identity.requests == []


@pytest.mark.parametrize("settings", [f"api_key = {KEY}\n", f"[settings]\n{KEY}\n"])
def test_settings_of_pyrax_that_cannot_be_read_are_named_and_not_shown(tmp_path: Path, settings: str) -> None:
    out = run(tmp_path, "rackspace://DFW", "requests", settings=settings)

    assert "ConfigError: ~/.pyrax.cfg cannot be read" in out
    assert KEY not in out
