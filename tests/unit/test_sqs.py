"""Amazon SQS: what the contract's tests cannot see, with moto's server behind a proxy that gives AWS's odd answers."""

import dataclasses
import inspect
import json
import logging
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import backend_sqs
import boto3.exceptions
import botocore.exceptions
import botocore.parsers
import botocore.session
import pytest
from fault_proxy import FaultProxy, Raw, Reply
from scripted_maker import ScriptedMaker
from support import free_port, wait_until

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    CredentialsError,
    Message,
    MessageRefused,
    Post,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueueUnavailable,
    Settlement,
)
from claim_queues.sqs import POLL_S, READ_TIMEOUT_S, AnswerLost, SqsQueues

SECRET, TOKEN = "canary-secret-key", "canary-session-token"
LOST = Raw(end="reset")
MIB = 1_048_576


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    with backend_sqs.credentials():
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield


@pytest.fixture
def proxy():
    with FaultProxy(backend_sqs.server()) as proxy:
        yield proxy


@pytest.fixture
def queues(proxy):
    with SqsQueues("eu-west-1", endpoint=proxy.url, ready_after=0) as queues:
        yield queues


@pytest.fixture
def queue(queues, proxy):
    return new_queue(queues, proxy)


@pytest.fixture
def responses(queues, proxy):
    return new_queue(queues, proxy)


def new_queue(queues, proxy):
    name = f"unit-{uuid.uuid4().hex}"
    queues.create(name)
    queues.stats(name)
    proxy.requests.clear()
    return name


def operation(request):
    return request.headers["X-Amz-Target"].removeprefix("AmazonSQS.")


def asked(proxy, name):
    """The bodies of the requests for one operation."""
    return [request.json for request in proxy.requests if operation(request) == name]


def answer(proxy, name, *replies):
    """Give the replies, one each, to requests for that operation; the server answers all else."""
    left = list(replies)
    proxy.answer = lambda r: left.pop(0) if left and operation(r) == name else FaultProxy.forward(proxy, r)


def refusal(code, status=400, **headers):
    return Reply(status, {"__type": f"com.amazonaws.sqs#{code}", "message": "said AWS"}, headers)


def partly(proxy, name, **failures):
    """Let the entries fail whose position is named (e0=...), once; the others are done."""

    def reply(request):
        if operation(request) != name or not failures:
            return proxy.forward(request)
        entries = request.json["Entries"]
        failed = [
            {"Id": entries[int(place.removeprefix("e"))]["Id"], "Message": "said AWS", **failure}
            for place, failure in failures.items()
        ]
        failures.clear()
        left = [entry for entry in entries if entry["Id"] not in {failure["Id"] for failure in failed}]
        body = json.dumps(request.json | {"Entries": left}).encode()
        done = json.loads(proxy.forward(dataclasses.replace(request, body=body)).body) if left else {}
        return Reply(200, done | {"Failed": failed})

    proxy.answer = reply


PASSING = {"Code": "InternalError", "SenderFault": False}
FOR_GOOD = {"Code": "InvalidMessageContents", "SenderFault": True}
NOT_HELD = {"Code": "AWS.SimpleQueueService.MessageNotInflight", "SenderFault": True}


def claimed(queues, queue, *bodies, ttl=60):
    queues.post(queue, list(bodies))
    return queues.claim(queue, ttl=ttl, grace=0, limit=10)


def with_response(message, responses):
    return Settlement(message, (Post(responses, f"response to {message.body}"),))


def bodies(queues, queue):
    claim = queues.claim(queue, ttl=60, grace=0, limit=10)
    return [message.body for message in claim.messages] if claim else []


# URL, endpoint, credentials


def test_the_url_names_region_endpoint_and_profile(tmp_path, monkeypatch):
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AKIAMINE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    with SqsQueues.from_url("sqs://eu-west-1?endpoint=http://127.0.0.1:5000&profile=mine") as queues:
        assert queues.address == "sqs://eu-west-1?endpoint=http://127.0.0.1:5000&profile=mine"
        assert queues._client.meta.region_name == "eu-west-1"
        assert queues._client.meta.endpoint_url == "http://127.0.0.1:5000"
    with SqsQueues.from_url("sqs://eu-central-1") as queues:
        assert queues.address == "sqs://eu-central-1"
        assert queues._client.meta.endpoint_url == "https://sqs.eu-central-1.amazonaws.com"


@pytest.mark.parametrize(
    "url",
    [
        "sqs:",
        "sqs://",
        "sqs:///eu-west-1",
        f"sqs://AKIA:{SECRET}@eu-west-1",
        f"sqs://eu-west-1/{SECRET}",
        f"sqs://eu-west-1?key={SECRET}",
        f"sqs://eu-west-1#{SECRET}",
        "sqs://eu-west-1?endpoint=",
        "sqs://eu-west-1?profile=a&profile=b",
        f"sqs://eu-west-1?endpoint=https://user:{SECRET}@host",
        "sqs://eu-west-1?endpoint=127.0.0.1:5000",
        "sqs://eu-west-1?endpoint=ftp://127.0.0.1",
        "sqs://eu-west-1?endpoint=http://169.254.169.254",
        "sqs://eu-west-1?endpoint=http://example.org",
    ],
)
def test_any_other_url_says_what_to_write_and_repeats_no_secret(url):
    with pytest.raises(ConfigError, match="write sqs://REGION") as raised:
        SqsQueues.from_url(url)

    assert not isinstance(raised.value, CredentialsError)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_plain_http_may_go_to_this_machine(host):
    SqsQueues("eu-west-1", endpoint=f"http://{host}:5000").close()


def test_plain_http_to_elsewhere_is_refused_when_the_environment_names_it_too(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", "http://example.org")

    with pytest.raises(ConfigError, match="endpoint"):
        SqsQueues("eu-west-1")


def test_plain_http_goes_to_no_proxy(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")

    with SqsQueues("eu-west-1", endpoint=proxy.url) as queues:
        assert not queues.exists("missing")


@pytest.fixture
def metadata(monkeypatch):
    """The metadata service of a machine that has no role."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with ScriptedMaker() as service:
        service.answer = lambda _: Reply(404)
        monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", service.url.removesuffix("/widgets"))
        yield service


def test_no_credentials_are_an_error_that_says_where_to_put_them(metadata, monkeypatch):
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED", raising=False)
    started = time.monotonic()

    with pytest.raises(CredentialsError, match="set AWS_ACCESS_KEY_ID"):
        SqsQueues("eu-west-1")

    assert time.monotonic() - started < 5
    assert not metadata.requests
    assert not metadata.others


def test_the_metadata_of_the_machine_are_looked_at_when_asked_for(metadata, monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")

    with pytest.raises(CredentialsError):
        SqsQueues("eu-west-1")

    assert metadata.requests


def test_a_profile_that_is_missing_is_an_error_of_credentials():
    with pytest.raises(CredentialsError, match="nobody"):
        SqsQueues("eu-west-1", profile="nobody")


def test_refused_credentials_are_read_again_once(queues, queue, proxy, monkeypatch):
    def reply(request):
        return proxy.forward(request) if "AKIANEW" in request.headers["Authorization"] else refusal("ExpiredToken", 403)

    proxy.answer = reply
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")

    assert len(queues.post(queue, ["posted"])) == 1
    assert len(proxy.requests) == 2


@pytest.mark.parametrize("code", ["ExpiredTokenException", "InvalidClientTokenId", "SignatureDoesNotMatch"])
def test_credentials_that_stay_refused_are_an_error_without_secrets(queues, queue, proxy, code):
    said = Reply(403, {"__type": code, "message": f"x-amz-security-token:{TOKEN}"})
    answer(proxy, "SendMessageBatch", said, said)

    with pytest.raises(CredentialsError, match="refuses the credentials") as raised:
        queues.post(queue, ["refused"])

    assert len(proxy.requests) == 2
    assert TOKEN not in str(raised.value)
    assert raised.value.__cause__ is None


def test_no_secret_reaches_a_log_an_error_or_a_repr(proxy, monkeypatch, caplog):
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    caplog.set_level(logging.INFO)

    with SqsQueues("eu-west-1", endpoint=proxy.url) as queues, pytest.raises(QueueNotFound) as raised:
        queues.stats("missing")

    told = f"{caplog.text} {raised.value} {queues!r} {queues.address} {vars(queues)}"
    assert SECRET not in told
    assert TOKEN not in told


# Errors

SDK_ERRORS = {
    QueueUnavailable: "ConnectTimeoutError ConnectionError EndpointConnectionError MetadataRetrievalError"
    " ProxyConnectionError SSLError",
    AnswerLost: "AwsChunkedWrapperError ChecksumError ConnectionClosedError FlexibleChecksumError HTTPClientError"
    " IncompleteReadError InvalidProxiesConfigError ReadTimeoutError ResponseParserError ResponseStreamingError",
    CredentialsError: "CredentialRetrievalError LoginAuthorizationCodeError LoginError LoginInsufficientPermissions"
    " LoginRefreshRequired LoginTokenLoadError NoAuthTokenError NoCredentialsError PartialCredentialsError"
    " ProfileNotFound RefreshWithMFAUnsupportedError SSOError SSOTokenLoadError TokenRetrievalError"
    " UnauthorizedSSOTokenError UnknownCredentialError",
    ConfigError: "AliasConflictParameterError",
    None: "ClientError",
}
MODELLED_ERRORS = {
    QueueNotFound: "QueueDoesNotExist InvalidAddress",
    CredentialsError: "InvalidSecurity",
    QueueForbidden: "KmsAccessDenied KmsDisabled KmsInvalidKeyUsage KmsInvalidState KmsNotFound KmsOptInRequired",
    QueueUnavailable: "KmsThrottled OverLimit PurgeQueueInProgress QueueDeletedRecently RequestThrottled",
    MessageRefused: "BatchRequestTooLong InvalidMessageContents",
    ClaimLost: "InvalidIdFormat MessageNotInflight ReceiptHandleIsInvalid",
    QueueError: "BatchEntryIdsNotDistinct EmptyBatchRequest InvalidAttributeName InvalidAttributeValue"
    " InvalidBatchEntryId QueueNameExists ResourceNotFoundException TooManyEntriesInBatchRequest UnsupportedOperation",
}


def test_every_error_of_the_sdk_is_mapped(queues):
    mapped = {name: kind for kind, names in SDK_ERRORS.items() for name in names.split()}
    found = {
        kind.__name__: kind
        for module in (botocore.exceptions, botocore.parsers)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and not issubclass(kind, Warning)
    }
    got = {}
    for name, kind in found.items():
        error = kind.__new__(kind)
        got[name] = type(queues._problem(error, "operation", "queue")) if name in found else None
    import pprint
    pprint.pprint({n: k.__name__ for n, k in sorted(got.items())})
