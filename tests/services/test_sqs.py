"""Amazon SQS: what the contract's tests cannot see, on moto's server behind a proxy that gives AWS's other answers."""

import json
import os
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import backend_sqs
import boto3
import pytest
from backends import bodies
from doubles.http_double import LOST, Answer, FaultProxy, Reply, Request
from support import HERE, wait_until

from claim_queues import (
    ClaimLost,
    ConfigError,
    CredentialsError,
    Post,
    PostIncomplete,
    QueueError,
    QueueForbidden,
    QueueNotFound,
    QueueUnavailable,
    Settlement,
    open_queues,
)

SECRET, TOKEN = "canary-secret-key", "canary-session-token"
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
    with backend_sqs.AgeingQueues(proxy.url) as queues:
        yield queues


@pytest.fixture
def queue(queues, proxy):
    return new_queue(queues, proxy)


@pytest.fixture
def responses(queues, proxy):
    return new_queue(queues, proxy)


def new_queue(queues, proxy):
    name = f"test-{uuid.uuid4().hex}"
    queues.create(name)
    queues.stats(name)  # its URL is known from here on
    proxy.requests.clear()
    return name


@pytest.fixture
def set_attributes():
    """Sets a queue's attributes through boto3's own client: the contract cannot."""
    with closing(boto3.client("sqs", region_name="eu-west-1", endpoint_url=backend_sqs.server())) as client:
        yield lambda queue, **values: client.set_queue_attributes(
            QueueUrl=client.get_queue_url(QueueName=queue)["QueueUrl"], Attributes=values
        )


def claim_of(queues, queue):
    return queues.claim(queue, ttl=60, grace=60, limit=10)


def claimed(queues, queue, *bodies):
    queues.post(queue, list(bodies))
    return claim_of(queues, queue)


def answered(claim, responses):
    return [Settlement(each, (Post(responses, f"response to {each.body}"),)) for each in claim.messages]


def refusal(code: str, status: int = 400, said: str = "said AWS") -> Reply:
    """SQS's own words for an error."""
    return Reply(status, {"__type": f"com.amazonaws.sqs#{code}", "message": said})


def partly(proxy: FaultProxy, id_: str, code: str = "InternalError") -> Answer:
    """The entry of that id fails, for good unless by an internal error; the server does the other entries."""

    def answer(request: Request) -> Reply:
        others = [entry for entry in request.json["Entries"] if entry["Id"] != id_]
        done = proxy.serve(replace(request, body=json.dumps(request.json | {"Entries": others}).encode()))
        failed = {"Id": id_, "Code": code, "Message": "said AWS", "SenderFault": code != "InternalError"}
        return Reply(200, json.loads(done.body) | {"Failed": [failed]})

    return answer


# URL, endpoint, credentials


def test_the_url_names_region_endpoint_and_profile(tmp_path, monkeypatch, proxy):
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AKIAMINE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    with open_queues(f"sqs://eu-north-1?endpoint={proxy.url}&profile=mine") as queues:
        assert queues.address == f"sqs://eu-north-1?endpoint={proxy.url}&profile=mine"
        assert queues.credentials == "those that boto3 finds (shared-credentials-file)"
        queues.exists("missing")

    (request,) = proxy.requests
    assert "Credential=AKIAMINE/" in request.headers["Authorization"]
    assert "/eu-north-1/sqs/" in request.headers["Authorization"]


@pytest.mark.parametrize(
    "url",
    [
        "sqs://",
        f"sqs://AKIA:{SECRET}@eu-west-1",
        f"sqs://eu-west-1/{SECRET}",
        f"sqs://eu-west-1?key={SECRET}",
        f"sqs://eu-west-1?{SECRET}",
        f"sqs://eu-west-1#{SECRET}",
        "sqs://eu-west-1?endpoint=",
        "sqs://eu-west-1?profile=a&profile=b",
        "sqs://eu-west-1?endpoint=nonsense",
        "sqs://eu-west-1?endpoint=http://[::1",
        "sqs://eu-west-1?endpoint=http://127.0.0.1:port",
        f"sqs://eu-west-1?endpoint=https://user:{SECRET}@host",
        "sqs://eu-west-1?endpoint=https://example.org?a=b",
        "sqs://eu-west-1?endpoint=http://localhost.example.org",
    ],
)
def test_any_other_url_says_what_to_write_and_repeats_no_secret(url):
    with pytest.raises(ConfigError, match=r"write sqs://REGION|only https is safe") as raised:
        open_queues(url)

    assert not isinstance(raised.value, CredentialsError)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("url", ["http://example.org", "nonsense"])
def test_an_endpoint_of_the_environment_is_no_better(monkeypatch, url):
    monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", url)

    with pytest.raises(ConfigError, match="endpoint"):
        open_queues("sqs://eu-west-1")


def test_this_machine_is_asked_through_no_proxy(proxy, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

    with open_queues("sqs://eu-west-1") as queues:
        assert not queues.exists("missing")


def test_without_credentials_an_error_says_where_to_put_them(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    with pytest.raises(CredentialsError, match="set AWS_ACCESS_KEY_ID"):
        open_queues("sqs://eu-west-1")


@pytest.mark.parametrize(
    "said",
    [
        refusal("ExpiredTokenException", 403),
        refusal("InvalidClientTokenId", 403),
        refusal("UnrecognizedClientException"),
        refusal("SignatureDoesNotMatch", 403, f"x-amz-security-token:{TOKEN}"),
    ],
    ids=lambda said: said.body["__type"],
)
def test_refused_credentials_are_an_error_at_the_start_and_read_again_once_they_worked(queue, proxy, monkeypatch, said):
    proxy.fail("", said)
    with open_queues(f"sqs://eu-west-1?endpoint={proxy.url}") as queues:
        with pytest.raises(CredentialsError, match="AWS refuses the credentials") as at_the_start:
            queues.exists(queue)
        assert at_the_start.value.__cause__ is None

        proxy.answer = proxy.serve
        assert queues.exists(queue)
        proxy.answer = lambda request: proxy.serve(request) if "AKIANEW" in request.headers["Authorization"] else said
        for _ in range(2):
            with pytest.raises(QueueUnavailable, match="AWS refuses the credentials") as later:
                queues.exists(queue)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")
        assert queues.exists(queue)

    assert TOKEN not in f"{at_the_start.value} {later.value}"


def test_a_credential_process_that_fails_for_a_while_is_asked_again(queue, proxy, tmp_path, monkeypatch):
    said = tmp_path / "said.json"
    (tmp_path / "config").write_text(f"[profile mine]\ncredential_process = cat {said}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 300))  # so soon that each call asks again
    found = {"Version": 1, "AccessKeyId": "AKIAMINE", "SecretAccessKey": "x", "Expiration": soon}
    url = f"sqs://eu-west-1?endpoint={proxy.url}&profile=mine"

    with pytest.raises(CredentialsError):
        open_queues(url)

    said.write_text(json.dumps(found))
    with open_queues(url) as queues:
        assert queues.exists(queue)
        said.write_text(json.dumps(found | {"Expiration": "2020-01-01T00:00:00Z"}))
        with pytest.raises(QueueUnavailable):
            queues.exists(queue)
        said.unlink()
        with pytest.raises(QueueUnavailable):
            queues.exists(queue)
        said.write_text(json.dumps(found))
        assert queues.exists(queue)


def test_no_secret_is_logged_at_debug(proxy, monkeypatch):
    monkeypatch.setenv("AWS_SESSION_TOKEN", TOKEN)
    program = (
        "import sys, structlog; from claim_queues.cli import configure_logging; configure_logging('text', 'debug');"
        "structlog.get_logger().debug('logs at debug');"
        "from claim_queues import open_queues; q = open_queues(sys.argv[1]); q.exists('missing'); print(vars(q))"
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


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (refusal("QueueDoesNotExist"), QueueNotFound),
        (refusal("AWS.SimpleQueueService.NonExistentQueue"), QueueNotFound),
        (refusal("AccessDeniedException"), QueueForbidden),
        (refusal("KmsThrottled"), QueueUnavailable),
        (refusal("ThrottlingException"), QueueUnavailable),
        (refusal("OverLimit", 403), QueueUnavailable),
        (refusal("InternalError"), QueueUnavailable),
        (refusal("Strange", 500), QueueUnavailable),
        (refusal("Strange", 429), QueueUnavailable),
        (refusal("Strange", 403), QueueForbidden),
        (refusal("Strange", 400), QueueError),
        (Reply(503), QueueUnavailable),
        (Reply(200, {}), QueueUnavailable),
        (Reply(200, "<html>Welcome</html>", {"Content-Type": "text/html"}), QueueUnavailable),
        (LOST, QueueUnavailable),
    ],
    ids=lambda said: said.body.get("__type") if isinstance(getattr(said, "body", None), dict) else None,
)
def test_what_sqs_answers_is_an_error_of_the_contract(queues, queue, proxy, said, expected):
    proxy.fail("GetQueueAttributes", said)

    with pytest.raises(expected) as raised:
        queues.stats(queue)

    assert type(raised.value) is expected or issubclass(type(raised.value), QueueUnavailable)
    for part in ("get_queue_attributes", queue, queues.address):
        assert part in str(raised.value)
    assert "<html>" not in str(raised.value)


def test_a_missing_queue_never_looks_empty(queues):
    with pytest.raises(QueueNotFound, match="create it with --create"):
        queues.claim("missing", ttl=60, grace=60, limit=1)


# Queues


def test_a_created_queue_keeps_messages_and_takes_bodies_as_long_as_it_can(proxy):
    with open_queues(f"sqs://eu-west-1?endpoint={proxy.url}") as queues:
        started = time.monotonic()
        queues.create(f"test-{uuid.uuid4().hex}")
        assert time.monotonic() - started >= 0.9  # SQS: "you must wait at least one second"

    (request,) = proxy.asked("CreateQueue")
    assert request["Attributes"] == {"MessageRetentionPeriod": "1209600", "MaximumMessageSize": "1048576"}


def test_inspect_names_what_would_surprise(queues, queue, responses, set_attributes):
    arn = f"arn:aws:sqs:eu-west-1:123456789012:{responses}"
    policy = json.dumps({"deadLetterTargetArn": arn, "maxReceiveCount": 3})
    set_attributes(queue, RedrivePolicy=policy, MessageRetentionPeriod="3600")

    moves, loses = queues.inspect(queue)

    assert "redrive policy" in moves
    assert "3,600 s" in loses


@pytest.mark.parametrize(
    ("is_posted_to", "operation", "is_named"),
    [
        (True, "SendMessageBatch", True),
        (False, "DeleteMessageBatch", True),
        (False, "ChangeMessageVisibilityBatch", True),
        (True, "DeleteMessageBatch", False),
        (False, "SendMessageBatch", False),
    ],
)
def test_inspect_names_what_a_policy_forbids_to_who_needs_it(queues, queue, proxy, is_posted_to, operation, is_named):
    assert queues.inspect(queue, is_posted_to=is_posted_to) == []
    proxy.fail(operation, refusal("AccessDeniedException", 403))

    found = queues.inspect(queue, is_posted_to=is_posted_to)

    assert len(found) == is_named
    assert all("said AWS" in sentence for sentence in found)


# Posting


def test_a_message_ttl_is_refused_and_nothing_is_sent(queues, queue, proxy):
    claim = claimed(queues, queue, "request")
    proxy.requests.clear()

    with pytest.raises(ConfigError, match="one message TTL for the whole queue"):
        queues.post(queue, ["lost"], ttl=60)
    with pytest.raises(ConfigError, match="one message TTL for the whole queue"):
        queues.settle(claim, [Settlement(claim.messages[0], (Post(queue, "lost", ttl=60),))])

    assert not proxy.requests


def test_every_character_of_json_comes_through_and_counts_as_its_utf8(queues, queue):
    surrogates = range(0xDFFF, 0xD7FF, -1)  # alone, as JSON's escapes can have them: none makes a pair with the next
    every = "".join(map(chr, [*range(0xD800), *surrogates, *range(0xE000, 0x11000), 0x10FFFE, 0x10FFFF]))
    body = [every, "雪" * 200_000]

    queues.post(queue, [body])

    assert bodies(claim_of(queues, queue)) == [body]


def test_bodies_that_are_too_long_together_go_in_several_requests(queues, queue, proxy):
    halves = [f"{number}" * (MIB // 2 - 3) for number in range(3)]

    ids = queues.post(queue, halves)

    assert [len(request["Entries"]) for request in proxy.asked("SendMessageBatch")] == [2, 1]
    claim = claim_of(queues, queue)
    assert {message.id: message.body for message in claim.messages} == dict(zip(ids, halves, strict=True))


def test_a_body_too_large_for_its_queue_does_not_stop_the_others(queues, queue, set_attributes):
    set_attributes(queue, MaximumMessageSize="1024")

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["first", "x" * 2000, "last"])

    assert (sorted(raised.value.accepted), list(raised.value.refused), raised.value.unknown) == ([0, 2], [1], ())
    assert bodies(claim_of(queues, queue)) == ["first", "last"]


@pytest.mark.parametrize("code", ["InvalidMessageContents", "InternalError"])
def test_a_post_that_fails_in_part_says_what_was_stored(queues, queue, proxy, code):
    proxy.fail("SendMessageBatch", partly(proxy, "1", code))

    with pytest.raises(PostIncomplete, match="2 of 3") as raised:
        queues.post(queue, [0, 1, 2])

    claim = claim_of(queues, queue)
    assert {message.body: message.id for message in claim.messages} == raised.value.accepted
    assert list(raised.value.refused) == [1]
    assert code in raised.value.refused[1]
    assert "said AWS" in raised.value.refused[1]
    assert raised.value.unknown == ()


@pytest.mark.parametrize("answer", ["lost", Reply(200, {}), Reply(200, "<html>Welcome</html>")], ids=str)
def test_bodies_whose_answer_is_lost_are_unknown(queues, queue, proxy, answer):
    proxy.fail("SendMessageBatch", proxy.lose if answer == "lost" else answer)

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["perhaps", "perhaps"])

    assert (raised.value.accepted, raised.value.refused, raised.value.unknown) == ({}, {}, (0, 1))


# Claiming


def test_a_wait_is_one_long_poll_after_the_other_and_ends_within_one(queues, queue, proxy):
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(queues.claim, queue, ttl=60, grace=60, limit=1, wait=600)
        wait_until(lambda: len(proxy.asked("ReceiveMessage")) >= 2)

        queues.stop_waiting()

        assert looking.result(20) is None
    assert {request["WaitTimeSeconds"] for request in proxy.asked("ReceiveMessage")} == {2}


def test_a_server_that_does_not_wait_is_not_asked_again_and_again(queues, queue, proxy):
    proxy.fail("ReceiveMessage", Reply(200, {}))

    assert queues.claim(queue, ttl=60, grace=60, limit=1, wait=3) is None

    assert len(proxy.asked("ReceiveMessage")) == 2


def test_a_message_that_comes_twice_at_once_is_held_once_by_its_newest_handle(queues, queue, proxy):
    queues.post(queue, ["twice"])

    def twice(request):
        (message,) = json.loads(proxy.serve(request).body)["Messages"]
        return Reply(200, {"Messages": [message | {"ReceiptHandle": "old"}, message]})

    proxy.fail("ReceiveMessage", twice)
    claim = claim_of(queues, queue)

    assert [message.handle == "old" for message in claim.messages] == [False]


# Renewing and releasing


def test_a_message_that_sqs_does_not_renew_leaves_the_claim_and_the_others_are_renewed(queues, queue, proxy):
    claim = claimed(queues, queue, "held for 12 hours", "held")
    lost, held = claim.messages
    queues.age(50)
    proxy.fail("ChangeMessageVisibilityBatch", partly(proxy, lost.id, "InvalidParameterValue"))

    queues.renew(claim)

    assert claim.messages == (held,)
    assert claim.holds(50)
    assert queues.settle(claim, [Settlement(lost), Settlement(held)]).deleted == {held.id}


def test_a_claim_is_lost_when_sqs_renews_none_of_its_messages(queues, queue):
    queues.post(queue, ["held"])
    claim = queues.claim(queue, ttl=43_200, grace=60, limit=1)
    time.sleep(0.1)

    with pytest.raises(ClaimLost):  # as moto, like AWS, refuses to hide it for more than 12 hours
        queues.renew(claim)

    assert not claim.holds(0)


def test_a_renewal_that_sqs_is_too_busy_for_is_no_loss_and_no_renewal(queues, queue, proxy):
    claim = claimed(queues, queue, 0, 1)
    queues.age(50)
    proxy.fail("ChangeMessageVisibilityBatch", partly(proxy, claim.messages[0].id))

    with pytest.raises(QueueUnavailable, match="InternalError"):
        queues.renew(claim)

    assert len(claim.messages) == 2
    assert not claim.holds(10)


def test_a_claim_that_is_over_by_our_clock_asks_sqs_for_nothing(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "lapsed")
    queues.age(59)  # 2 s before its TTL it is not trusted any more
    proxy.requests.clear()

    with pytest.raises(ClaimLost):
        queues.renew(claim)
    queues.release(claim)
    assert not queues.settle(claim, answered(claim, responses)).deleted

    assert not proxy.requests


def test_a_release_asks_for_whole_seconds_not_too_few_and_at_most_12_hours(queues, queue, proxy):
    for delay, seconds in ((3.2, 4), (50_000, 43_200)):
        queues.post(queue, ["released"])
        queues.release(queues.claim(queue, ttl=60, grace=60, limit=1), delay=delay)
        assert proxy.asked("ChangeMessageVisibilityBatch")[-1]["Entries"][0]["VisibilityTimeout"] == seconds


def test_a_release_that_fails_in_part_is_repeated_for_the_rest(queues, queue, proxy):
    claim = claimed(queues, queue, "first", "second")
    proxy.fail("ChangeMessageVisibilityBatch", partly(proxy, claim.messages[1].id), times=1)

    with pytest.raises(QueueUnavailable):
        queues.release(claim)
    taken_over = claim_of(queues, queue)
    queues.release(claim)

    assert [message.body for message in taken_over.messages] == ["first"]
    assert bodies(claim_of(queues, queue)) == ["second"]


# Settling


def test_what_lapses_while_its_response_is_posted_is_not_deleted(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "lapsing")

    def late(request):
        queues.age(59)
        return proxy.serve(request)

    proxy.fail("SendMessageBatch", late)
    settled = queues.settle(claim, answered(claim, responses))

    assert not settled.deleted
    assert not proxy.asked("DeleteMessageBatch")


def test_a_message_whose_post_failed_is_kept_and_only_that_post_is_repeated(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "failed", "made")
    failed, made = claim.messages
    settlements = [
        Settlement(failed, (Post(responses, "dead letter"), Post(responses, "response"))),
        Settlement(made, (Post(responses, "response to made"),)),
    ]
    proxy.fail("SendMessageBatch", partly(proxy, "1"), times=1)

    with pytest.raises(QueueUnavailable, match="InternalError"):
        queues.settle(claim, settlements)
    assert [entry["Id"] for request in proxy.asked("DeleteMessageBatch") for entry in request["Entries"]] == [made.id]
    assert queues.settle(claim, settlements).deleted == {failed.id, made.id}

    assert claim.messages == ()
    assert sorted(bodies(claim_of(queues, responses))) == ["dead letter", "response", "response to made"]


def test_a_delete_by_a_handle_that_sqs_does_not_know_is_a_loss(queues, queue, proxy):
    claim = claimed(queues, queue, "lost", "held")
    lost, held = claim.messages
    proxy.fail("DeleteMessageBatch", partly(proxy, lost.id, "ReceiptHandleIsInvalid"))

    settled = queues.settle(claim, [Settlement(lost), Settlement(held)])

    assert (settled.deleted, settled.refused) == ({held.id}, {})


def test_what_was_deleted_before_an_error_is_told_by_the_settlement_that_works(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "a", "b")
    settlements = answered(claim, responses)
    proxy.fail("DeleteMessageBatch", partly(proxy, claim.messages[1].id), times=1)
    with pytest.raises(QueueUnavailable):
        queues.settle(claim, settlements)
    queues.renew(claim)

    assert queues.settle(claim, settlements).deleted == {each.message.id for each in settlements}
    assert claim.messages == ()
