"""Amazon SQS: what the contract's tests cannot see, on moto's server behind a proxy that gives AWS's other answers."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import backend_sqs
import boto3
import pytest
from doubles.sqs_proxy import LOST, Reply, SqsProxy, done_but_lost, partly, refusal
from support import HERE, free_port, wait_until

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
PASSING = {"Code": "InternalError", "SenderFault": False}
FOR_GOOD = {"Code": "InvalidMessageContents", "SenderFault": True}
TOO_LONG_HELD = {"Code": "InvalidParameterValue", "SenderFault": True}


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    with backend_sqs.credentials():
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        yield


@pytest.fixture
def proxy():
    with SqsProxy(backend_sqs.server()) as proxy:
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
def sdk():
    """boto3's own client, for what the contract cannot do."""
    client = boto3.client("sqs", region_name="eu-west-1", endpoint_url=backend_sqs.server())
    yield client
    client.close()


def set_attributes(sdk, queue, **values):
    sdk.set_queue_attributes(QueueUrl=sdk.get_queue_url(QueueName=queue)["QueueUrl"], Attributes=values)


def claimed(queues, queue, *bodies, ttl=60):
    queues.post(queue, list(bodies))
    return queues.claim(queue, ttl=ttl, grace=60, limit=10)


def answered(claim, responses):
    return [Settlement(each, (Post(responses, f"response to {each.body}"),)) for each in claim.messages]


def bodies(queues, queue):
    claim = queues.claim(queue, ttl=60, grace=60, limit=10)
    return [message.body for message in claim.messages] if claim else []


def sizes(proxy, operation):
    """How many entries each request for a batch had."""
    return [len(request["Entries"]) for request in proxy.asked(operation)]


# URL, endpoint, credentials


def test_the_url_names_region_endpoint_and_profile(tmp_path, monkeypatch, proxy):
    (tmp_path / "credentials").write_text("[mine]\naws_access_key_id = AKIAMINE\naws_secret_access_key = x\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))

    with open_queues(f"sqs://eu-north-1?endpoint={proxy.url}&profile=mine") as queues:
        assert queues.address == f"sqs://eu-north-1?endpoint={proxy.url}&profile=mine"
        assert queues.credentials == "those that boto3 finds (shared-credentials-file)"
        queues.exists("missing")

    (_, headers, _) = proxy.requests[0]
    assert "Credential=AKIAMINE/" in headers["Authorization"]
    assert "/eu-north-1/sqs/" in headers["Authorization"]


@pytest.mark.parametrize(
    "url",
    [
        "sqs://",
        f"sqs://AKIA:{SECRET}@eu-west-1",
        f"sqs://eu-west-1/{SECRET}",
        f"sqs://eu-west-1?key={SECRET}",
        f"sqs://eu-west-1?{SECRET}",
        f"sqs://eu-west-1#{SECRET}",
        "sqs://[eu-west-1",
        "sqs://eu-west-1?endpoint=",
        "sqs://eu-west-1?profile=a&profile=b",
        "sqs://eu-west-1?endpoint=nonsense",
        "sqs://eu-west-1?endpoint=http://[::1",
        "sqs://eu-west-1?endpoint=http://127.0.0.1:port",
        f"sqs://eu-west-1?endpoint=https://user:{SECRET}@host",
        "sqs://eu-west-1?endpoint=http://169.254.169.254",
        "sqs://eu-west-1?endpoint=http://localhost.example.org",
    ],
)
def test_any_other_url_says_what_to_write_and_repeats_no_secret(url):
    with pytest.raises(ConfigError, match=r"write sqs://REGION|only https is safe") as raised:
        open_queues(url)

    assert not isinstance(raised.value, CredentialsError)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize("by", ["environment", "profile"])
@pytest.mark.parametrize("url", ["http://example.org", "nonsense"])
def test_an_endpoint_of_the_environment_or_a_profile_is_no_better(monkeypatch, tmp_path, by, url):
    if by == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL_SQS", url)
    (tmp_path / "config").write_text(
        f"[profile mine]\nendpoint_url = {url}\naws_access_key_id = A\naws_secret_access_key = x\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))

    with pytest.raises(ConfigError, match="endpoint"):
        open_queues("sqs://eu-west-1?profile=mine")


@pytest.mark.parametrize("by", ["url", "environment"])
def test_this_machine_is_asked_through_no_proxy(proxy, monkeypatch, by):
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
    if by == "environment":
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)

    with open_queues("sqs://eu-west-1" + (f"?endpoint={proxy.url}" if by == "url" else "")) as queues:
        assert not queues.exists("missing")


def test_without_credentials_an_error_says_where_to_put_them(monkeypatch):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")

    with pytest.raises(CredentialsError, match="set AWS_ACCESS_KEY_ID"):
        open_queues("sqs://eu-west-1")


REFUSED = [
    refusal("ExpiredTokenException", 403),
    refusal("InvalidClientTokenId", 403),
    refusal("UnrecognizedClientException"),
    Reply(403, {"__type": "SignatureDoesNotMatch", "message": f"x-amz-security-token:{TOKEN}"}),
]


@pytest.mark.parametrize("said", REFUSED, ids=lambda said: said.body["__type"])
def test_credentials_that_sqs_refuses_at_the_start_are_an_error_without_secrets(proxy, said):
    proxy.answer = lambda *_: said

    queues = open_queues(f"sqs://eu-west-1?endpoint={proxy.url}")
    with queues, pytest.raises(CredentialsError, match="AWS refuses the credentials") as raised:
        queues.exists("queue")

    assert TOKEN not in str(raised.value)
    assert raised.value.__cause__ is None


@pytest.mark.parametrize("said", REFUSED[:1])
def test_credentials_that_worked_once_are_read_again_after_a_refusal(queues, queue, proxy, monkeypatch, said):
    proxy.answer = lambda proxy, headers, body: (
        proxy.forward(headers, body) if "Credential=AKIANEW/" in headers["Authorization"] else said
    )
    for _ in range(2):
        with pytest.raises(QueueUnavailable, match="AWS refuses the credentials") as raised:
            queues.stats(queue)
        assert TOKEN not in str(raised.value)

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIANEW")

    assert queues.stats(queue).total == 0


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

    assert proxy.requests[0][1]["X-Amz-Security-Token"] == TOKEN
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
        (refusal("KMS.AccessDeniedException"), QueueForbidden),
        (refusal("KmsThrottled"), QueueUnavailable),
        (refusal("ThrottlingException"), QueueUnavailable),
        (refusal("RequestThrottled", 403), QueueUnavailable),
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
    proxy.answers["GetQueueAttributes"] = [said] * 2

    with pytest.raises(expected) as raised:
        queues.stats(queue)

    assert type(raised.value) is expected or issubclass(type(raised.value), QueueUnavailable)
    for part in ("get_queue_attributes", queue, queues.address):
        assert part in str(raised.value)
    assert "<html>" not in str(raised.value)


def test_a_long_text_in_chinese_and_an_integer_of_any_size_come_through(queues, queue):
    body = {"text": "雪" * 200_000, "number": 2**70}

    queues.post(queue, [body])

    assert bodies(queues, queue) == [body]


def test_a_missing_queue_never_looks_empty(queues):
    with pytest.raises(QueueNotFound, match="create it with --create"):
        queues.claim("missing", ttl=60, grace=60, limit=1)
    with pytest.raises(QueueNotFound, match="create it with --create"):
        queues.post("missing", ["lost"])


# Queues


def test_a_created_queue_keeps_messages_and_takes_bodies_as_long_as_it_can(proxy):
    with open_queues(f"sqs://eu-west-1?endpoint={proxy.url}") as queues:
        started = time.monotonic()
        queues.create(f"test-{uuid.uuid4().hex}")
        assert time.monotonic() - started >= 0.9  # SQS: "you must wait at least one second"

    (request,) = proxy.asked("CreateQueue")
    assert request["Attributes"] == {"MessageRetentionPeriod": "1209600", "MaximumMessageSize": "1048576"}


def test_inspect_names_what_would_surprise(queues, queue, responses, sdk):
    arn = sdk.get_queue_attributes(
        QueueUrl=sdk.get_queue_url(QueueName=responses)["QueueUrl"], AttributeNames=["QueueArn"]
    )
    policy = json.dumps({"deadLetterTargetArn": arn["Attributes"]["QueueArn"], "maxReceiveCount": 3})
    set_attributes(sdk, queue, RedrivePolicy=policy, MessageRetentionPeriod="3600")

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
    proxy.answers[operation] = [refusal("AccessDeniedException", 403)]

    found = queues.inspect(queue, is_posted_to=is_posted_to)

    assert ["said AWS" in sentence for sentence in found] == [True] * is_named
    proxy.answers.clear()


# Posting


def test_a_message_ttl_is_refused_and_nothing_is_sent(queues, queue, proxy):
    claim = claimed(queues, queue, "request")
    proxy.requests.clear()

    with pytest.raises(ConfigError, match="one message TTL for the whole queue"):
        queues.post(queue, ["lost"], ttl=60)
    with pytest.raises(ConfigError, match="one message TTL for the whole queue"):
        queues.settle(claim, [Settlement(claim.messages[0], (Post(queue, "lost", ttl=60),))])

    assert not proxy.requests


def test_every_character_of_json_comes_through(queues, queue):
    surrogates = range(0xDFFF, 0xD7FF, -1)  # alone, as JSON's escapes can have them: none makes a pair with the next
    every = "".join(map(chr, [*range(0xD800), *surrogates, *range(0xE000, 0x11000), 0x10FFFE, 0x10FFFF]))

    queues.post(queue, [every])

    assert bodies(queues, queue) == [every]


def test_bodies_that_are_too_long_together_go_in_several_requests(queues, queue, proxy):
    halves = [f"{number}" * (MIB // 2 - 3) for number in range(3)]

    ids = queues.post(queue, halves)

    assert sizes(proxy, "SendMessageBatch") == [2, 1]
    claim = queues.claim(queue, ttl=60, grace=60, limit=10)
    assert {message.id: message.body for message in claim.messages} == dict(zip(ids, halves, strict=True))


def test_a_body_too_large_for_its_queue_does_not_stop_the_others(queues, queue, sdk):
    set_attributes(sdk, queue, MaximumMessageSize="1024")

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["first", "x" * 2000, "last"])

    assert (sorted(raised.value.accepted), list(raised.value.refused), raised.value.unknown) == ([0, 2], [1], ())
    assert bodies(queues, queue) == ["first", "last"]


@pytest.mark.parametrize("why", [FOR_GOOD, PASSING], ids=lambda why: why["Code"])
def test_a_post_that_fails_in_part_says_what_was_stored(queues, queue, proxy, why):
    proxy.answers["SendMessageBatch"] = [partly({"1": why})]

    with pytest.raises(PostIncomplete, match="2 of 3") as raised:
        queues.post(queue, [0, 1, 2])

    claim = queues.claim(queue, ttl=60, grace=60, limit=10)
    assert {message.body: message.id for message in claim.messages} == raised.value.accepted
    assert list(raised.value.refused) == [1]
    for part in (why["Code"], "said AWS"):
        assert part in raised.value.refused[1]
    assert raised.value.unknown == ()


@pytest.mark.parametrize("answer", [done_but_lost, Reply(200, {}), Reply(200, "<html>Welcome</html>")])
def test_bodies_whose_answer_is_lost_are_unknown(queues, queue, proxy, answer):
    proxy.answers["SendMessageBatch"] = [answer] * 2

    with pytest.raises(PostIncomplete) as raised:
        queues.post(queue, ["perhaps", "perhaps"])

    assert (raised.value.accepted, raised.value.refused, raised.value.unknown) == ({}, {}, (0, 1))


# Claiming


def test_a_wait_is_one_long_poll_after_the_other_and_ends_within_one(queues, queue, proxy):
    with ThreadPoolExecutor(1) as pool:
        looking = pool.submit(queues.claim, queue, ttl=60, grace=60, limit=1, wait=600)
        wait_until(lambda: len(proxy.asked("ReceiveMessage")) == 2)

        queues.stop_waiting()

        assert looking.result(20) is None
    assert [request["WaitTimeSeconds"] for request in proxy.asked("ReceiveMessage")] == [2, 2]


def test_a_server_that_does_not_wait_is_not_asked_again_and_again(queues, queue, proxy):
    proxy.answers["ReceiveMessage"] = [Reply(200, {})] * 100

    assert queues.claim(queue, ttl=60, grace=60, limit=1, wait=3) is None

    assert len(proxy.asked("ReceiveMessage")) == 2


def test_a_message_that_comes_twice_at_once_is_held_once_by_its_newest_handle(queues, queue, proxy):
    queues.post(queue, ["twice"])

    def twice(proxy, headers, body):
        (message,) = json.loads(proxy.forward(headers, body).body)["Messages"]
        return Reply(200, {"Messages": [message | {"ReceiptHandle": "old"}, message]})

    proxy.answers["ReceiveMessage"] = [twice]

    claim = queues.claim(queue, ttl=60, grace=60, limit=10)

    assert [message.handle == "old" for message in claim.messages] == [False]


# Renewing and releasing


def test_a_message_that_sqs_does_not_renew_leaves_the_claim_and_the_others_are_renewed(queues, queue, proxy):
    claim = claimed(queues, queue, "held for 12 hours", "held")
    lost, held = claim.messages
    queues.age(50)
    proxy.answers["ChangeMessageVisibilityBatch"] = [partly({lost.id: TOO_LONG_HELD})]

    queues.renew(claim)

    assert claim.messages == (held,)
    assert claim.holds(50)
    assert queues.settle(claim, [Settlement(lost), Settlement(held)]).deleted == {held.id}


def test_a_claim_is_lost_when_sqs_renews_none_of_its_messages(queues, queue):
    claim = claimed(queues, queue, "held", ttl=43_200)
    threading.Event().wait(0.1)

    with pytest.raises(ClaimLost):  # as moto, like AWS, refuses to hide it for more than 12 hours
        queues.renew(claim)

    assert not claim.holds(0)


def test_a_renewal_that_sqs_is_too_busy_for_is_no_loss_and_no_renewal(queues, queue, proxy):
    claim = claimed(queues, queue, 0, 1)
    queues.age(50)
    proxy.answers["ChangeMessageVisibilityBatch"] = [partly({claim.messages[0].id: PASSING})]

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
    proxy.answers["ChangeMessageVisibilityBatch"] = [partly({claim.messages[1].id: PASSING})]

    with pytest.raises(QueueUnavailable):
        queues.release(claim)
    taken_over = queues.claim(queue, ttl=60, grace=60, limit=10)
    queues.release(claim)

    assert [message.body for message in taken_over.messages] == ["first"]
    assert bodies(queues, queue) == ["second"]


# Settling


@pytest.mark.parametrize(
    "said", [refusal("ServiceUnavailable", 503), LOST, done_but_lost, refusal("AccessDenied", 403)]
)
def test_nothing_is_deleted_before_its_posts_are_stored(queues, queue, responses, proxy, said):
    claim = claimed(queues, queue, "held")
    proxy.answers["SendMessageBatch"] = [said] * 2

    with pytest.raises((QueueUnavailable, QueueForbidden)):
        queues.settle(claim, answered(claim, responses))
    assert not proxy.asked("DeleteMessageBatch")

    proxy.answers.clear()
    assert queues.settle(claim, answered(claim, responses)).deleted


def test_what_lapses_while_its_response_is_posted_is_not_deleted(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "lapsing")
    proxy.answers["SendMessageBatch"] = [lambda proxy, headers, body: (queues.age(59), proxy.forward(headers, body))[1]]

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
    proxy.answers["SendMessageBatch"] = [partly({"1": PASSING})]

    with pytest.raises(QueueUnavailable, match="InternalError"):
        queues.settle(claim, settlements)
    assert [entry["Id"] for request in proxy.asked("DeleteMessageBatch") for entry in request["Entries"]] == [made.id]
    assert queues.settle(claim, settlements).deleted == {failed.id, made.id}

    assert claim.messages == ()
    assert sorted(bodies(queues, responses)) == ["dead letter", "response", "response to made"]


@pytest.mark.parametrize("said", [PASSING, None], ids=["in part", "unanswered"])
def test_a_delete_that_failed_is_repeated_and_nothing_is_posted_again(queues, queue, responses, proxy, said):
    claim = claimed(queues, queue, 0, 1)
    held, settlements = claim.messages, answered(claim, responses)
    proxy.answers["DeleteMessageBatch"] = [partly({held[0].id: said})] if said else [done_but_lost] * 2

    with pytest.raises(QueueUnavailable):
        queues.settle(claim, settlements)
    settled = queues.settle(claim, settlements)

    assert settled.deleted == {message.id for message in held}
    assert sorted(bodies(queues, responses)) == ["response to 0", "response to 1"]
    queues.age(60)
    assert not queues.settle(claim, settlements).deleted


def test_a_delete_by_a_handle_that_sqs_does_not_know_is_a_loss(queues, queue, proxy):
    claim = claimed(queues, queue, "lost", "held")
    lost, held = claim.messages
    proxy.answers["DeleteMessageBatch"] = [partly({lost.id: {"Code": "ReceiptHandleIsInvalid", "SenderFault": True}})]

    settled = queues.settle(claim, [Settlement(lost), Settlement(held)])

    assert (settled.deleted, settled.refused) == ({held.id}, {})


def test_what_was_deleted_before_an_error_is_told_by_the_settlement_that_works(queues, queue, responses, proxy):
    claim = claimed(queues, queue, "a", "b")
    settlements = answered(claim, responses)
    proxy.answers["DeleteMessageBatch"] = [partly({claim.messages[1].id: PASSING})]
    with pytest.raises(QueueUnavailable):
        queues.settle(claim, settlements)
    queues.renew(claim)

    assert queues.settle(claim, settlements).deleted == {each.message.id for each in settlements}
    assert claim.messages == ()
