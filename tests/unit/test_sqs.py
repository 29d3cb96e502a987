"""Amazon SQS: what the contract's tests cannot see, with moto's server behind a proxy that gives AWS's odd answers."""

import dataclasses
import inspect
import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import backend_sqs
import botocore.exceptions
import botocore.parsers
import pytest
from fault_proxy import FaultProxy, Raw, Reply
from scripted_maker import ScriptedMaker
from support import HERE, free_port, wait_until

from claim_queues import (
    Claim,
    ClaimLost,
    ConfigError,
    CredentialsError,
    MessageRefused,
    Post,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueueUnavailable,
    Settlement,
)
from claim_queues.errors import AnswerLost
from claim_queues.sqs import POLL_S, SqsQueues
from claim_queues.sqs_client import READ_TIMEOUT_S, entry_problem, problem

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
    with backend_sqs.LocalQueues("eu-west-1", endpoint=proxy.url) as queues:
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


def partly(proxy, name, failures, times=1):
    """Let entries fail, by entry id, in the first `times` requests for that operation; the others are done."""
    left = [failures] * times

    def reply(request):
        if operation(request) != name or not left:
            return proxy.forward(request)
        failing = left.pop()
        entries = [entry for entry in request.json["Entries"] if entry["Id"] not in failing]
        body = json.dumps(request.json | {"Entries": entries}).encode()
        done = json.loads(proxy.forward(dataclasses.replace(request, body=body)).body) if entries else {}
        return Reply(200, done | {"Failed": [{"Id": id_, "Message": "said AWS"} | why for id_, why in failing.items()]})

    proxy.answer = reply


PASSING = {"Code": "InternalError", "SenderFault": False}
FOR_GOOD = {"Code": "InvalidMessageContents", "SenderFault": True}
NOT_HELD = {"Code": "AWS.SimpleQueueService.MessageNotInflight", "SenderFault": True}
UNKNOWN = {"Code": "ReceiptHandleIsInvalid", "SenderFault": True}


def attributes(queues, queue, *names):
    return queues._client.get_queue_attributes(QueueUrl=queues._look_up(queue), AttributeNames=names)["Attributes"]


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
        f"sqs://eu-west-1?{SECRET}",
        f"sqs://eu-west-1?{SECRET}=key",
        f"sqs://eu-west-1#{SECRET}",
        "sqs://[eu-west-1",
        "sqs://eu-west-1?endpoint=",
        "sqs://eu-west-1?endpoint=nonsense",
        "sqs://eu-west-1?endpoint=http://[::1",
        "sqs://eu-west-1?endpoint=http://127.0.0.1:port",
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


def test_a_mistyped_option_of_the_url_is_named():
    with pytest.raises(ConfigError, match=r"^sqs:// takes no such option: endpont, profil: write sqs://REGION"):
        SqsQueues.from_url("sqs://eu-west-1?endpont=http://127.0.0.1:5000&profil=mine")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_plain_http_may_go_to_this_machine(host):
    SqsQueues("eu-west-1", endpoint=f"http://{host}:5000").close()


@pytest.mark.parametrize("url", ["http://example.org", "nonsense"])
def test_an_endpoint_of_the_environment_is_no_better(monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", url)

    with pytest.raises(ConfigError, match="endpoint"):
        SqsQueues("eu-west-1")


def test_a_password_in_the_endpoint_is_not_repeated_where_credentials_are_missing(metadata):
    with pytest.raises(ConfigError) as raised:
        SqsQueues("eu-west-1", endpoint=f"https://user:{SECRET}@host")

    assert SECRET not in str(raised.value)


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


def test_no_secret_reaches_an_error_or_a_repr(queues):
    with pytest.raises(QueueNotFound) as raised:
        queues.stats("missing")

    assert SECRET not in f"{raised.value} {queues!r} {queues.address} {vars(queues)}"


def test_no_secret_is_logged_at_debug(proxy, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    program = (
        "import sys; from claim_queues.command_line import configure_logging;"
        "configure_logging('text', 'debug'); import logging; logging.debug('logs at debug');"
        "from claim_queues.sqs import SqsQueues; SqsQueues.from_url(sys.argv[1]).exists('missing')"
    )

    ran = subprocess.run(
        [sys.executable, "-c", program, f"sqs://eu-west-1?endpoint={proxy.url}"],
        env=os.environ | {"PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
        check=True,
    )

    assert proxy.requests[0].headers["X-Amz-Security-Token"] == TOKEN
    assert "logs at debug" in ran.stderr
    assert SECRET not in ran.stdout + ran.stderr
    assert TOKEN not in ran.stdout + ran.stderr


# Errors

SDK_ERRORS = {
    QueueUnavailable: "ConnectTimeoutError ConnectionError EndpointConnectionError MetadataRetrievalError"
    " ProxyConnectionError SSLError",
    AnswerLost: "ChecksumError ConnectionClosedError HTTPClientError IncompleteReadError ReadTimeoutError"
    " ResponseParserError ResponseStreamingError",
    CredentialsError: "CredentialRetrievalError LoginAuthorizationCodeError LoginError LoginInsufficientPermissions"
    " LoginRefreshRequired LoginTokenLoadError NoAuthTokenError NoCredentialsError PartialCredentialsError"
    " ProfileNotFound RefreshWithMFAUnsupportedError SSOError SSOTokenLoadError TokenRetrievalError"
    " UnauthorizedSSOTokenError UnknownCredentialError",
    ConfigError: "AliasConflictParameterError ApiVersionNotFoundError AwsChunkedWrapperError BaseEndpointResolverError"
    " BotoCoreError CapacityNotAvailableError ConfigNotFound ConfigParseError DataNotFoundError EndpointProviderError"
    " EndpointResolutionError EndpointVariantError FlexibleChecksumError InfiniteLoopConfigError"
    " InvalidChecksumConfigError InvalidConfigError InvalidDNSNameError InvalidDefaultsMode"
    " InvalidEndpointConfigurationError InvalidEndpointDiscoveryConfigurationError InvalidExpressionError"
    " InvalidHostLabelError InvalidIMDSEndpointError InvalidIMDSEndpointModeError InvalidMaxRetryAttemptsError"
    " InvalidProxiesConfigError InvalidRegionError InvalidRetryConfigurationError InvalidRetryModeError"
    " InvalidS3AddressingStyleError InvalidS3UsEast1RegionalEndpointConfigError"
    " InvalidSTSRegionalEndpointsConfigError MD5UnavailableError MissingDependencyException MissingParametersError"
    " NoRegionError OperationNotPageableError PaginationError ParamValidationError RangeError"
    " ServiceNotInRegionError StubAssertionError StubResponseError UnStubbedResponseError"
    " UnknownClientMethodError UnknownEndpointError UnknownEndpointResolutionBuiltInName"
    " UnknownFIPSEndpointError UnknownKeyError UnknownParameterError UnknownRegionError UnknownServiceError"
    " UnknownServiceStyle UnknownSignatureVersionError UnknownTokenProviderError UnseekableStreamError"
    " UnsupportedOutpostResourceError UnsupportedS3AccesspointConfigurationError UnsupportedS3ArnError"
    " UnsupportedS3ConfigurationError UnsupportedS3ControlArnError UnsupportedS3ControlConfigurationError"
    " UnsupportedServiceProtocolsError UnsupportedSignatureVersionError ValidationError WaiterConfigError WaiterError",
}
ANSWERED = {"ClientError", "EventStreamError"}
"""Mapped by what SQS answered: MODELLED_ERRORS, and the codes and statuses below."""
NOT_FOR_SQS = {"MissingServiceIdError", "NoInitialResponseError", "ParseError", "UndefinedModelAttributeError"}
"""Of the SDK's own models, of event streams, of XML."""
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


def by_name(table):
    return {name: kind for kind, names in table.items() for name in names.split()}


def test_every_error_of_the_sdk_is_mapped():
    found = {
        kind.__name__: kind
        for module in (botocore.exceptions, botocore.parsers)
        for _, kind in inspect.getmembers(module, inspect.isclass)
        if issubclass(kind, Exception) and not issubclass(kind, Warning)
    }
    for name in ANSWERED | NOT_FOR_SQS:
        del found[name]

    problems = {name: problem(kind.__new__(kind), "post") for name, kind in found.items()}

    assert {name: type(mapped) for name, mapped in problems.items()} == by_name(SDK_ERRORS)


def test_every_error_that_sqs_is_known_to_answer_is_mapped(queues):
    exceptions = queues._client.exceptions
    shapes = {shape.name: shape for shape in queues._client.meta.service_model.error_shapes}

    problems = {
        name: problem(exceptions.from_code(shape.error_code)({"Error": {"Code": ""}}, "post"), "post")
        for name, shape in shapes.items()
    }

    assert {name: type(mapped) for name, mapped in problems.items()} == by_name(MODELLED_ERRORS)


@pytest.mark.parametrize(
    ("code", "status", "expected"),
    [
        ("AWS.SimpleQueueService.NonExistentQueue", 400, QueueNotFound),
        ("com.amazonaws.sqs#QueueDoesNotExist", 400, QueueNotFound),
        ("AccessDeniedException", 400, QueueForbidden),
        ("AccessDenied", 403, QueueForbidden),
        ("UnrecognizedClientException", 400, CredentialsError),
        ("ThrottlingException", 400, QueueUnavailable),
        ("ServiceUnavailable", 503, QueueUnavailable),
        ("Strange", 500, QueueUnavailable),
        ("Strange", 429, QueueUnavailable),
        ("Strange", 403, QueueForbidden),
        ("Strange", 401, CredentialsError),
        ("Strange", 400, QueueError),
        ("Strange", 302, QueueError),
    ],
)
def test_what_sqs_answers_is_mapped_by_its_code_and_else_by_its_status(queues, proxy, code, status, expected):
    answer(proxy, "GetQueueUrl", refusal(code, status), refusal(code, status))

    with pytest.raises(expected) as raised:
        queues.stats("somewhere")

    assert type(raised.value) is expected


@pytest.mark.parametrize(
    ("code", "fault", "expected"),
    [
        ("InvalidMessageContents", True, ClaimLost),
        ("com.amazonaws.sqs#MessageNotInflight", True, ClaimLost),
        ("Strange", True, ClaimLost),
        ("Strange", False, QueueUnavailable),
        ("OverLimit", True, QueueUnavailable),
        ("AccessDeniedException", True, QueueForbidden),
    ],
)
def test_an_entry_that_fails_is_busy_or_forbidden_or_what_a_refusal_means_there(code, fault, expected):
    entry = {"Id": "0", "Code": code, "SenderFault": fault, "Message": "said AWS"}

    mapped = entry_problem(entry, "delete_message_batch", "delete", ClaimLost)

    assert type(mapped) is expected
    assert "said AWS" in str(mapped)


def test_an_error_without_a_body_goes_by_its_status(queues, queue, proxy):
    answer(proxy, "GetQueueAttributes", Reply(503), Reply(502, "<html>Bad Gateway</html>"))

    with pytest.raises(QueueUnavailable, match="HTTP 502, not in SQS's words: look for a wrong region") as raised:
        queues.stats(queue)

    assert "<html>" not in str(raised.value)


def test_a_wrong_region_of_the_local_server_is_one_sentence(proxy):
    with SqsQueues("us-nowhere-9", endpoint=proxy.url) as queues, pytest.raises(QueueUnavailable) as raised:
        queues.stats("somewhere")

    assert str(raised.value).endswith(
        "HTTP 500, not in SQS's words: look for a wrong region or endpoint, or for a proxy"
    )
    assert "<" not in str(raised.value)


def test_the_wait_that_a_busy_service_asks_for_is_passed_on_and_not_cut_short(queues, queue, proxy):
    answer(proxy, "GetQueueAttributes", refusal("Throttling", 503, **{"Retry-After": "7"}))

    with pytest.raises(QueueUnavailable) as raised:
        queues.stats(queue)

    assert raised.value.retry_after_s == 7
    assert len(proxy.requests) == 1


def test_what_may_pass_is_asked_once_more(queues, queue, proxy):
    answer(proxy, "GetQueueAttributes", refusal("RequestThrottled", 403))
    assert queues.stats(queue).total == 0

    answer(proxy, "GetQueueAttributes", LOST)
    assert queues.stats(queue).total == 0


def test_a_service_that_is_down_is_unavailable_and_named():
    address = f"http://127.0.0.1:{free_port()}"

    with SqsQueues("eu-west-1", endpoint=address) as queues, pytest.raises(QueueUnavailable, match=address):
        queues.exists("queue")


def test_every_call_has_its_timeouts(queues):
    config = queues._client.meta.config

    assert config.connect_timeout == 5
    assert config.read_timeout == READ_TIMEOUT_S > POLL_S + 5
    assert config.retries["total_max_attempts"] == 1


def test_what_is_no_answer_of_sqs_never_looks_like_an_empty_queue(queues, proxy):
    proxy.answer = lambda _: Reply(200, "<html>Welcome</html>", {"Content-Type": "text/html"})

    for look in (queues.stats, lambda name: queues.claim(name, ttl=60, grace=0, limit=1)):
        with pytest.raises(QueueUnavailable, match="no answer of SQS"):
            look("somewhere")


@pytest.mark.parametrize("headers", ["", "Conte", "Content-Type: application/json", "Content-Length: 2\r\nDa"])
def test_an_answer_that_ends_in_its_head_never_looks_like_an_empty_queue(queues, queue, proxy, headers):
    queues.exists(queue)
    proxy.answer = lambda _: Raw([f"HTTP/1.1 200 OK\r\n{headers}".encode()])

    for look in (queues.stats, lambda name: queues.claim(name, ttl=60, grace=0, limit=1)):
        with pytest.raises(QueueUnavailable, match="cut short"):
            look(queue)


def test_a_missing_queue_never_looks_empty(queues):
    for look in (
        queues.stats,
        queues.inspect,
        queues.purge,
        lambda name: queues.claim(name, ttl=60, grace=0, limit=1),
        lambda name: queues.post(name, ["lost"]),
    ):
        with pytest.raises(QueueNotFound, match="create it with --create"):
            look("missing")


def test_a_queue_that_was_deleted_is_missing_for_all_calls(queues, queue):
    queues._client.delete_queue(QueueUrl=queues._look_up(queue))

    with pytest.raises(QueueNotFound):
        queues.stats(queue)
    assert not queues.exists(queue)


# Queues


def test_a_created_queue_keeps_messages_and_takes_bodies_as_long_as_it_can(queues, queue):
    found = attributes(queues, queue, "MessageRetentionPeriod", "MaximumMessageSize")

    assert found == {"MessageRetentionPeriod": "1209600", "MaximumMessageSize": str(MIB)}
    assert queues.inspect(queue) == []


def test_a_queue_that_exists_with_other_attributes_stays_as_it_is(queues, queue):
    queues._client.set_queue_attributes(QueueUrl=queues._look_up(queue), Attributes={"MessageRetentionPeriod": "60"})

    queues.create(queue)

    assert attributes(queues, queue, "MessageRetentionPeriod") == {"MessageRetentionPeriod": "60"}


def test_a_new_queue_is_given_the_second_that_it_needs(proxy):
    with SqsQueues("eu-west-1", endpoint=proxy.url) as queues:
        started = time.monotonic()
        queues.create(f"unit-{uuid.uuid4().hex}")

        assert time.monotonic() - started >= 1


def test_it_tells_its_clock_its_credentials_and_what_it_was_asked(queues, queue):
    queues.requests.clear()
    assert queues.credentials == "those that boto3 finds (env)"
    assert abs(queues.clock_ahead(queue) or 99) < 5
    assert queues.claim(queue, ttl=60, grace=60, limit=1) is None
    assert queues.requests["receive_message"] == 1
    assert queues.requests.keys() <= {"receive_message", "get_queue_attributes"}


def test_inspect_names_what_would_surprise(queues, queue, responses):
    arn = attributes(queues, responses, "QueueArn")["QueueArn"]
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 3})
    odd = {"RedrivePolicy": policy, "MessageRetentionPeriod": "3600", "DelaySeconds": "9", "MaximumMessageSize": "2048"}
    queues._client.set_queue_attributes(QueueUrl=queues._look_up(queue), Attributes=odd)

    warnings = " ".join(queues.inspect(queue))

    assert len(queues.inspect(queue)) == 4
    for part in (responses, "3,600 s", "9 s", "2,048 bytes"):
        assert part in warnings


def test_a_purge_that_is_refused_while_another_runs_says_how_long(queues, queue, proxy):
    answer(proxy, "PurgeQueue", refusal("PurgeQueueInProgress", 403))

    with pytest.raises(QueueUnavailable, match="PurgeQueueInProgress") as raised:
        queues.purge(queue)

    assert raised.value.retry_after_s == 60


def test_stats_tell_free_claimed_and_delayed_messages_apart(queues, queue, proxy):
    numbers = {"": "3", "NotVisible": "2", "Delayed": "1"}
    found = {f"ApproximateNumberOfMessages{kind}": number for kind, number in numbers.items()}
    answer(proxy, "GetQueueAttributes", Reply(200, {"Attributes": found}))

    stats = queues.stats(queue)

    assert (stats.free, stats.claimed, stats.delayed, stats.total, stats.oldest_age) == (3, 2, 1, 6, None)


def test_what_sqs_cannot_do_is_refused_with_the_reason(queues, queue, proxy):
    for call in (queues.browse, queues.end_marker, lambda name: queues.delete(name, ["id"])):
        with pytest.raises(ConfigError, match="claim"):
            call(queue)

    assert not proxy.requests


# Posting


def test_a_message_ttl_is_refused_and_nothing_is_sent(queues, queue, proxy):
    claim = claimed(queues, queue, "request")
    proxy.requests.clear()

    with pytest.raises(ConfigError, match="one message TTL for the whole queue"):
        queues.post(queue, ["lost"], ttl=60)
    with pytest.raises(ConfigError, match="one message TTL for the whole queue"):
        queues.settle(claim, [Settlement(claim.messages[0], (Post(queue, "lost", ttl=60),))])

    assert not proxy.requests


def test_a_request_posts_ten_bodies_and_no_more_than_its_bytes(queues, queue, proxy):
    queues.post(queue, ["short"] * 11)
    assert [len(request["Entries"]) for request in asked(proxy, "SendMessageBatch")] == [10, 1]

    proxy.requests.clear()
    half = "x" * (MIB // 2 - len('""'))
    queues.post(queue, [half, half, "one more", half])
    assert [len(request["Entries"]) for request in asked(proxy, "SendMessageBatch")] == [2, 2]


def test_json_text_holds_only_characters_that_sqs_takes(queues):
    text = queues.limits.encode("".join(map(chr, range(0x11000))) + "\U0010ffff")

    assert set(text) <= set(map(chr, range(0x20, 0x7F + 1)))


def test_a_body_that_fails_for_a_reason_that_may_pass_is_sent_once_more_alone(queues, queue, proxy):
    partly(proxy, "SendMessageBatch", {"1": PASSING})

    ids = queues.post(queue, [0, 1, 2])

    assert [len(request["Entries"]) for request in asked(proxy, "SendMessageBatch")] == [3, 1]
    claim = queues.claim(queue, ttl=60, grace=0, limit=10)
    assert {message.id: message.body for message in claim.messages} == dict(zip(ids, [0, 1, 2], strict=True))


def test_bodies_that_are_sent_once_more_keep_their_order(queues, queue, proxy):
    partly(proxy, "SendMessageBatch", {str(number): PASSING for number in range(10)})

    queues.post(queue, list(range(10)))

    assert bodies(queues, queue) == list(range(10))


def test_bodies_that_are_sent_alone_end_with_the_first_that_fails_for_another_reason(queues, queue, proxy):
    down = [refusal("ServiceUnavailable", 503)] * 2
    answer(proxy, "SendMessageBatch", refusal("BatchRequestTooLong"), *down)

    with pytest.raises(QueueUnavailable, match="ServiceUnavailable"):
        queues.post(queue, list(range(5)))

    assert [len(request["Entries"]) for request in asked(proxy, "SendMessageBatch")] == [5, 1, 1]


def test_a_body_that_sqs_refuses_for_good_is_named_and_the_others_are_stored(queues, queue, proxy):
    partly(proxy, "SendMessageBatch", {"0": FOR_GOOD})

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["refused", *range(10)])

    assert sorted(raised.value.accepted) == list(range(1, 11))
    assert list(raised.value.refused) == [0]
    for part in ("InvalidMessageContents", "said AWS"):
        assert part in raised.value.refused[0]
    assert raised.value.unknown == ()


def test_a_post_of_which_nothing_is_stored_says_why(queues, queue, proxy):
    partly(proxy, "SendMessageBatch", {"0": FOR_GOOD})
    with pytest.raises(MessageRefused, match="InvalidMessageContents"):
        queues.post(queue, ["refused"])

    answer(proxy, "SendMessageBatch", refusal("OverLimit"), refusal("OverLimit"))
    with pytest.raises(QueueUnavailable, match="OverLimit"):
        queues.post(queue, ["refused"])


def test_a_body_too_large_for_its_queue_does_not_stop_the_others(queues, queue):
    queues._client.set_queue_attributes(QueueUrl=queues._look_up(queue), Attributes={"MaximumMessageSize": "1024"})

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["first", "x" * 2000, "last"])

    assert list(raised.value.refused) == [1]
    assert bodies(queues, queue) == ["first", "last"]


def test_a_post_whose_answer_is_lost_is_sent_once_more(queues, queue, proxy):
    proxy.answer = lambda request: (
        (proxy.forward(request), LOST)[1] if len(proxy.requests) == 1 else proxy.forward(request)
    )

    queues.post(queue, ["perhaps twice"])

    assert bodies(queues, queue) == ["perhaps twice"] * 2


def test_bodies_whose_answer_is_lost_twice_are_unknown_and_the_post_ends(queues, queue, proxy):
    answer(proxy, "SendMessageBatch", LOST, LOST)

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, list(range(25)))

    assert raised.value.accepted == {}
    assert raised.value.unknown == tuple(range(10))
    assert sorted(raised.value.refused) == list(range(10, 25))


def test_a_lost_answer_stays_unknown_whatever_the_second_try_says(queues, queue, proxy):
    answer(proxy, "SendMessageBatch", LOST, refusal("OverLimit"))

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["perhaps"])

    assert raised.value.unknown == (0,)


def test_an_entry_of_which_sqs_says_nothing_is_unknown(queues, queue, proxy):
    answer(proxy, "SendMessageBatch", Reply(200, {}), Reply(200, {}))

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["perhaps"])

    assert raised.value.unknown == (0,)


def test_a_post_that_ends_half_way_says_what_was_stored(queues, queue, proxy):
    proxy.answer = lambda r: proxy.forward(r) if len(proxy.requests) == 1 else refusal("ServiceUnavailable", 503)

    with pytest.raises(PostIncomplete, match="10 of 25") as raised:
        queues.post(queue, list(range(25)))

    assert sorted(raised.value.accepted) == list(range(10))
    assert sorted(raised.value.refused) == list(range(10, 25))
    assert len(proxy.requests) == 3


# Claiming


def test_a_claim_is_one_receive_of_all_that_was_asked_for(queues, queue, proxy):
    queues.post(queue, list(range(12)))

    claim = queues.claim(queue, ttl=45, grace=0, limit=10)

    (request,) = asked(proxy, "ReceiveMessage")
    assert (request["MaxNumberOfMessages"], request["VisibilityTimeout"], request["WaitTimeSeconds"]) == (10, 45, 0)
    assert len({message.handle for message in claim.messages}) == 10
    assert {message.ttl for message in claim.messages} == {1_209_600}


def test_the_retention_of_a_queue_is_asked_once_and_before_anything_is_hidden(queues, queue, proxy):
    queues.post(queue, ["hidden"])
    answer(proxy, "GetQueueAttributes", refusal("AccessDenied", 403))

    with pytest.raises(QueueForbidden):
        queues.claim(queue, ttl=60, grace=0, limit=1)
    assert not asked(proxy, "ReceiveMessage")

    for _ in range(2):
        queues.claim(queue, ttl=60, grace=0, limit=1)
    assert len(asked(proxy, "GetQueueAttributes")) == 2


def test_a_wait_is_one_long_poll_after_the_other(queues, queue, proxy):
    assert queues.claim(queue, ttl=60, grace=0, limit=1, wait=2.5) is None

    assert [request["WaitTimeSeconds"] for request in asked(proxy, "ReceiveMessage")] == [POLL_S, 1]


def test_a_service_that_does_not_wait_is_not_asked_again_and_again(queues, queue, proxy):
    answer(proxy, "ReceiveMessage", *[Reply(200, {})] * 100)
    started = time.monotonic()

    assert queues.claim(queue, ttl=60, grace=0, limit=1, wait=3) is None

    assert len(asked(proxy, "ReceiveMessage")) == 2
    assert time.monotonic() - started >= 2.9


def test_stop_waiting_ends_a_wait_within_one_long_poll(queues, queue, proxy):
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(queues.claim, queue, ttl=60, grace=0, limit=1, wait=600)
        wait_until(lambda: asked(proxy, "ReceiveMessage"))

        queues.stop_waiting()

        assert looking.result(POLL_S + 5) is None
    assert len(asked(proxy, "ReceiveMessage")) == 1


def test_nothing_waits_once_waiting_was_stopped(queues, queue, proxy):
    queues.stop_waiting()

    assert queues.claim(queue, ttl=60, grace=0, limit=1, wait=600) is None

    assert [request["WaitTimeSeconds"] for request in asked(proxy, "ReceiveMessage")] == [0]


def test_bodies_of_others_come_as_their_text(queues, queue):
    queues._client.send_message(QueueUrl=queues._look_up(queue), MessageBody="no JSON: Grüße")

    assert bodies(queues, queue) == ["no JSON: Grüße"]


def received(handle="handle", **changes):
    attributes = {"ApproximateReceiveCount": "1", "SentTimestamp": str(int(time.time() * 1000))}
    body = {"Body": "1", "MD5OfBody": "c4ca4238a0b923820dcc509a6f75849b", "Attributes": attributes}
    entry = {"MessageId": "id", "ReceiptHandle": handle} | body | changes
    return {name: value for name, value in entry.items() if value is not None}


@pytest.mark.parametrize(
    "entry",
    [
        received(MessageId=None),
        received(ReceiptHandle=None),
        received(Body=None),
        received(Attributes=None),
        received(MD5OfBody="c4ca4238a0b923820dcc509a6f758490"),
    ],
    ids=["no id", "no handle", "no body", "no attributes", "damaged"],
)
def test_a_message_that_came_damaged_is_no_message(queues, queue, proxy, entry):
    answer(proxy, "ReceiveMessage", Reply(200, {"Messages": [entry]}))

    with pytest.raises(QueueUnavailable, match="no answer of SQS"):
        queues.claim(queue, ttl=60, grace=0, limit=1)


def test_a_message_that_comes_twice_at_once_is_held_once_by_its_newest_handle(queues, queue, proxy):
    answer(proxy, "ReceiveMessage", Reply(200, {"Messages": [received("old"), received("new")]}))

    (message,) = queues.claim(queue, ttl=60, grace=0, limit=10).messages

    assert message.handle == "new"


def test_a_claim_of_another_service_is_refused(queues, queue):
    with pytest.raises(ConfigError):
        queues.renew(Claim("id", queue, (), 60), ttl=60)


# Renewing and releasing


def test_a_renewal_says_which_messages_are_lost_and_renews_the_others(queues, queue, proxy):
    claim = claimed(queues, queue, "lost", "held", ttl=2)
    partly(proxy, "ChangeMessageVisibilityBatch", {claim.messages[0].id: NOT_HELD})

    with pytest.raises(ClaimLost) as raised:
        queues.renew(claim, ttl=60)

    assert raised.value.ids == {claim.messages[0].id}
    later(claim, 30)
    assert claim.holds(claim.messages[1])


def later(claim, seconds):
    """Let that much of the claim's time be over."""
    for message_id in claim.until:
        claim.until[message_id] -= seconds


def test_a_claim_that_has_lapsed_by_our_clock_is_lost_without_asking(queues, queue, proxy):
    claim = claimed(queues, queue, "lapsed")
    later(claim, 60)
    proxy.requests.clear()

    with pytest.raises(ClaimLost):
        queues.renew(claim, ttl=60)
    queues.release(claim)
    assert queues.settle(claim, [with_response(claim.messages[0], queue)]).lost == {claim.messages[0].id}

    assert not proxy.requests


def test_a_claim_lasts_from_before_it_was_asked_for(queues, queue, proxy):
    before = time.monotonic()
    claim = claimed(queues, queue, "held")
    asked_at = claim.until[claim.messages[0].id] - 60

    assert before <= asked_at <= claim.asked_at <= time.monotonic()


def test_a_renewal_that_sqs_is_too_busy_for_is_no_loss(queues, queue, proxy):
    claim = claimed(queues, queue, "lost", "held")
    lost, held = claim.messages
    partly(proxy, "ChangeMessageVisibilityBatch", {lost.id: NOT_HELD, held.id: PASSING}, times=2)

    with pytest.raises(QueueUnavailable, match="InternalError"):
        queues.renew(claim, ttl=60)

    assert [len(request["Entries"]) for request in asked(proxy, "ChangeMessageVisibilityBatch")] == [2, 1]


def test_a_renewal_beyond_12_hours_after_the_receive_is_a_loss(queues, queue):
    claim = claimed(queues, queue, "held", ttl=43_200)
    wait_until(lambda: time.monotonic() - claim.asked_at > 0.1)

    with pytest.raises(ClaimLost) as raised:  # as moto, like AWS, refuses it
        queues.renew(claim, ttl=43_200)

    assert raised.value.ids == {claim.messages[0].id}


def test_a_delay_ends_within_12_hours_after_the_receive(queues, queue, proxy):
    claim = claimed(queues, queue, "released", ttl=43_200)
    old = dataclasses.replace(claim, asked_at=claim.asked_at - 40_000)

    queues.release(old, delay=43_200)

    (request,) = asked(proxy, "ChangeMessageVisibilityBatch")
    assert 3_190 <= request["Entries"][0]["VisibilityTimeout"] < 3_200


def test_a_release_asks_for_whole_seconds_and_not_too_few(queues, queue, proxy):
    claim = claimed(queues, queue, "released")

    queues.release(claim, delay=3.2)

    assert asked(proxy, "ChangeMessageVisibilityBatch")[0]["Entries"][0]["VisibilityTimeout"] == 4


def test_a_release_that_fails_says_so_and_can_be_repeated(queues, queue, proxy):
    claim = claimed(queues, queue, "released")
    answer(proxy, "ChangeMessageVisibilityBatch", LOST, LOST)

    with pytest.raises(QueueUnavailable):
        queues.release(claim)
    assert claim.holds(claim.messages[0])
    queues.release(claim)

    assert not claim.holds(claim.messages[0])
    assert bodies(queues, queue) == ["released"]


# Settling


def test_a_full_claim_is_settled_in_two_requests(queues, queue, responses, proxy):
    claim = claimed(queues, queue, *range(10))
    proxy.requests.clear()

    queues.settle(claim, [with_response(message, responses) for message in claim.messages])

    assert [operation(r) for r in proxy.requests] == ["SendMessageBatch", "DeleteMessageBatch"]


def test_nothing_is_deleted_before_its_posts_are_stored(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "held")
    answer(proxy, "SendMessageBatch", refusal("ServiceUnavailable", 503), LOST)

    with pytest.raises(QueueUnavailable):
        queues.settle(claim, [with_response(claim.messages[0], responses)])

    assert not asked(proxy, "DeleteMessageBatch")


def while_posting(proxy, act):
    """Let something happen while a post is under way."""
    proxy.answer = lambda r: (operation(r) == "SendMessageBatch" and act(), proxy.forward(r))[1]


def test_what_lapses_while_its_response_is_posted_is_lost(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "lapsing")
    while_posting(proxy, lambda: later(claim, 60))

    settled = queues.settle(claim, [with_response(claim.messages[0], responses)])

    assert (settled.lost, settled.deleted) == ({claim.messages[0].id}, frozenset())
    assert not asked(proxy, "DeleteMessageBatch")


def test_a_renewal_that_ends_while_others_are_posted_lets_nothing_be_deleted_unposted(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "lapsed", "held")
    lapsed, held = claim.messages
    claim.until[lapsed.id] -= 60
    while_posting(proxy, lambda: claim.until.update({lapsed.id: time.monotonic() + 60}))

    settled = queues.settle(claim, [with_response(message, responses) for message in claim.messages])

    assert (settled.lost, settled.deleted) == ({lapsed.id}, {held.id})
    assert bodies(queues, responses) == ["response to held"]


def test_nothing_is_deleted_whose_response_queue_is_missing(queues, queue, proxy):
    claim = claimed(queues, queue, "held")

    with pytest.raises(QueueNotFound, match="missing"):
        queues.settle(claim, [with_response(claim.messages[0], "missing")])

    assert not asked(proxy, "DeleteMessageBatch")


def test_a_message_with_one_post_not_stored_is_kept_and_only_that_post_is_repeated(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "failed", "made")
    failed, made = claim.messages
    settlements = [
        Settlement(failed, (Post(responses, "dead letter"), Post(responses, "response"))),
        with_response(made, responses),
    ]
    partly(proxy, "SendMessageBatch", {"1": PASSING}, times=2)

    with pytest.raises(QueueUnavailable, match="InternalError"):
        queues.settle(claim, settlements)
    assert [len(request["Entries"]) for request in asked(proxy, "DeleteMessageBatch")] == [1]

    assert queues.settle(claim, settlements).deleted == {failed.id, made.id}
    assert sorted(bodies(queues, responses)) == ["dead letter", "response", "response to made"]


def test_a_delete_that_fails_for_a_reason_that_may_pass_is_asked_once_more(queues, queue, responses, proxy):
    claim = claimed(queues, queue, 0, 1)
    partly(proxy, "DeleteMessageBatch", {claim.messages[0].id: PASSING})

    settled = queues.settle(claim, [with_response(message, responses) for message in claim.messages])

    assert settled.deleted == {message.id for message in claim.messages}
    assert [len(request["Entries"]) for request in asked(proxy, "DeleteMessageBatch")] == [2, 1]


def test_what_cannot_be_deleted_now_is_neither_deleted_nor_lost_and_not_posted_again(queues, queue, responses, proxy):
    claim = claimed(queues, queue, 0, 1)
    settlements = [with_response(message, responses) for message in claim.messages]
    partly(proxy, "DeleteMessageBatch", {claim.messages[0].id: PASSING}, times=2)

    with pytest.raises(QueueUnavailable, match="InternalError"):
        queues.settle(claim, settlements)
    settled = queues.settle(claim, settlements)

    assert settled.deleted == {message.id for message in claim.messages}
    assert [len(request["Entries"]) for request in asked(proxy, "DeleteMessageBatch")] == [2, 1, 1]
    assert sorted(bodies(queues, responses)) == ["response to 0", "response to 1"]


def test_a_delete_by_a_handle_that_sqs_does_not_know_is_a_loss(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "lost", "held")
    partly(proxy, "DeleteMessageBatch", {claim.messages[0].id: UNKNOWN})

    settled = queues.settle(claim, [Settlement(message) for message in claim.messages])

    assert (settled.lost, settled.deleted) == ({claim.messages[0].id}, {claim.messages[1].id})


def test_a_message_whose_response_sqs_refuses_is_kept_and_the_others_are_settled(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "refused", "settled")
    partly(proxy, "SendMessageBatch", {"0": FOR_GOOD})

    settled = queues.settle(claim, [with_response(message, responses) for message in claim.messages])

    assert list(settled.refused) == [claim.messages[0].id]
    assert settled.deleted == {claim.messages[1].id}
    assert not settled.lost


def test_a_hundred_requests_share_one_connection(queues, queue, proxy):
    for _ in range(100):
        queues.stats(queue)

    assert proxy.connections == 1
