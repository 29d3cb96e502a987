"""The real consumer and producer while a queue service fails: nothing lost, no busy loop, one log line a change."""

import dataclasses
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from in_process import call
from scripted_maker import Raw, Reply, Request, ScriptedMaker
from service_scripts import ALL, CLAIM_TTL_S, Service, over_a_wire, parameters
from support import Script, wait_until

import widget_consumer
import widget_producer
from claim_queues import QueueNotFound
from claim_queues.keeper import Keeper

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for InfluxDB"  # openstacksdk 4.22 warns of it at every clouds.yaml
)
FAILS, IS_BACK = "the queue service fails: trying again", "the queue service is back"
LOST = "claim lost: another consumer gets the message"
EXIT_FAILED, EXIT_CREDENTIALS, EXIT_PARTLY_POSTED = 1, 4, 6
RETRY_AFTER_S = 2
FAULTS = {
    "reset": Raw(end="reset"),
    "503": Reply(503),
    "429": Reply(429, headers={"Retry-After": str(RETRY_AFTER_S)}),
}


@pytest.fixture(autouse=True)
def queues_exist(service: Service) -> None:
    service.create()


@pytest.fixture
def maker() -> Any:
    with ScriptedMaker() as maker:
        yield maker


def stop(consumer: Script) -> str:
    """End the consumer as a person would; gives its log."""
    consumer.signal(signal.SIGTERM)
    assert consumer.exit_code() == 0
    assert "Traceback" not in consumer.err
    return consumer.err


def wait_for_responses(service: Service, count: int, *running: Script) -> None:
    def answered() -> bool:
        for script in running:
            assert script.process.poll() is None, script.err
        return service.count_responses() >= count

    wait_until(answered)


def assert_all_made_once(service: Service, maker: ScriptedMaker, ids: list[str]) -> None:
    wait_until(lambda: service.left() == (0, 0))
    assert service.outcomes() == dict.fromkeys(ids, "created")
    assert sorted(maker.widgets) == sorted(ids)


def hold_back(maker: ScriptedMaker) -> threading.Event:
    """Let the maker answer only once the event is set."""
    go_on = threading.Event()

    def answer(request: Request) -> Reply:
        assert go_on.wait(60)
        return maker.real(request)

    maker.answer = answer
    return go_on


# Claims that end


def test_what_a_killed_consumer_held_is_received_again_after_the_claim_ttl_and_made_once(
    service: Service, maker: ScriptedMaker
) -> None:
    def make_and_say_nothing(request: Request) -> Raw:
        maker.real(request)
        return Raw(end="hang")

    ids = service.submit(5)
    maker.answer = make_and_say_nothing
    with service.consumer(maker, "--slots", 2) as killed:
        wait_until(lambda: len(maker.requests) == 2)
        killed.kill()
    maker.answer = maker.real

    assert service.take(service.request_queue) == []
    service.advance(CLAIM_TTL_S + 1)
    with service.consumer(maker) as another:
        wait_for_responses(service, 5, another)
        log = stop(another)

    assert {request.headers["X-Message-Receive-Count"] for request in maker.requests[2:]} == {"2"}
    assert len(maker.requests) == 2 + 5
    assert_all_made_once(service, maker, ids)
    assert FAILS not in log


def leave_the_rest(service: Service, consumer: Script) -> None:
    """Let the consumer finish its POST and claim nothing more, not even by a claim that is on its way."""
    if service.proxy:
        service.fail({"claim"}, Reply(503))
        wait_until(lambda: FAILS in consumer.err)
    consumer.signal(signal.SIGTERM)
    wait_until(lambda: "stopping" in consumer.err)
    service.mend()


@pytest.mark.parametrize("first_to_end", ["the one that lost it", "the one that holds it"])
def test_a_claim_that_ends_in_mid_post_and_is_received_by_another_makes_one_widget(
    service: Service, maker: ScriptedMaker, first_to_end: str
) -> None:
    go_on = [threading.Event(), threading.Event()]

    def answer(request: Request) -> Reply:
        number = len(maker.requests) - 1
        answered = maker.real(request)
        assert go_on[number].wait(60)
        return answered

    def logs() -> str:
        return one.err + other.err

    maker.answer = answer
    ids = service.submit(1)
    with service.consumer(maker) as one:
        wait_until(lambda: len(maker.requests) == 1)
        leave_the_rest(service, one)
        service.end_claims()
        with service.consumer(maker) as other:
            wait_until(lambda: len(maker.requests) == 2)
            first, second = go_on if first_to_end == "the one that lost it" else reversed(go_on)
            first.set()
            wait_until(lambda: service.count_responses() == 1 or LOST in logs())
            second.set()
            assert one.exit_code() == 0
            wait_until(lambda: " created " in other.err)
            stop(other)

    assert len({request.headers["Idempotency-Key"] for request in maker.requests}) == 1
    assert_all_made_once(service, maker, ids)
    assert (logs().count(" created "), other.err.count(FAILS)) == (2, 0)
    assert logs().count(LOST) == service.queues.limits.atomic_settle  # elsewhere it settles as its holder does


def test_a_dead_letter_that_comes_too_late_deletes_nothing_that_another_holds(
    service: Service, maker: ScriptedMaker
) -> None:
    go_on = [threading.Event(), threading.Event()]

    def answer(request: Request) -> Reply:
        number = len(maker.requests) - 1
        assert go_on[number].wait(60)
        return maker.real(request) if number else Reply(500)

    maker.answer = answer
    ids = service.submit(1)
    is_fenced = service.queues.limits.fenced_delete
    with service.consumer(maker, "--max-receives", 1) as one:
        wait_until(lambda: len(maker.requests) == 1)
        leave_the_rest(service, one)
        service.end_claims()
        with service.consumer(maker) as other:
            wait_until(lambda: len(maker.requests) == 2)
            go_on[0].set()
            assert one.exit_code() == 0
            assert "dead letter" in one.err
            assert service.queues.stats(service.request_queue).total == is_fenced
            go_on[1].set()
            wait_until(lambda: " created " in other.err)
            stop(other)

    assert one.err.count(LOST) == is_fenced
    assert list(maker.widgets) == ids
    assert service.queues.stats(service.request_queue).total == 0
    outcomes = [response["outcome"] for response in service.take(service.response_queue)]
    assert outcomes[-1] == "created"
    assert outcomes[:-1] == ["failed"] * (not service.queues.limits.atomic_settle)


@dataclasses.dataclass
class Here:
    """A consumer in a thread of this process, whose keeper has a clock that the test moves."""

    service: Service
    maker: ScriptedMaker
    monkeypatch: pytest.MonkeyPatch
    ahead_s: float = 0.0

    @contextmanager
    def consuming(self, **options: Any) -> Iterator[None]:
        keeper = functools.partial(Keeper, clock=lambda: time.monotonic() + self.ahead_s)
        self.monkeypatch.setattr(widget_consumer, "Keeper", keeper)
        with self.service.consumer_here(self.maker.url, **options) as self.consumer, ThreadPoolExecutor() as pool:
            running = pool.submit(self.consumer.run)
            try:
                yield
            finally:
                self.consumer.stop()
            running.result(30)

    def advance(self, seconds: float) -> None:
        """Let that much time pass for the consumer."""
        self.ahead_s += seconds
        with self.consumer._keeper._changed:
            self.consumer._keeper._changed.notify()


@pytest.fixture
def here(
    service: Service, maker: ScriptedMaker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Here:
    caplog.set_level("INFO")
    return Here(service, maker, monkeypatch)


@over_a_wire
def test_a_renewal_that_the_service_cannot_answer_is_asked_for_again_and_nothing_is_lost(
    service: Service, maker: ScriptedMaker, here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = hold_back(maker)
    ids = service.submit(3)
    with here.consuming(slots=1):
        wait_until(lambda: len(maker.requests) == 1)
        service.fail({"renew"}, Reply(503), times=4)
        here.advance(CLAIM_TTL_S / 2)
        wait_until(lambda: IS_BACK in caplog.text)
        go_on.set()
        assert_all_made_once(service, maker, ids)

    assert len(maker.requests) == 3
    assert len(service.asked("renew")) == 4 + 1
    assert_pauses(service)
    assert (caplog.messages.count(FAILS), caplog.messages.count(IS_BACK), caplog.messages.count(LOST)) == (1, 1, 0)


def test_a_renewal_that_comes_too_late_ends_the_work_on_its_messages_and_they_are_received_anew(
    service: Service, maker: ScriptedMaker, here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    go_on = hold_back(maker)
    ids = service.submit(3)
    with here.consuming(slots=1):
        wait_until(lambda: len(maker.requests) == 1)
        service.end_claims()
        here.advance(CLAIM_TTL_S / 2)
        wait_until(lambda: caplog.messages.count(LOST) == 3)
        assert service.count_responses() == 0
        go_on.set()
        wait_for_responses(service, 3)

    assert len(maker.requests) == 1 + 3
    assert_all_made_once(service, maker, ids)
    assert (caplog.messages.count(FAILS), caplog.messages.count(LOST)) == (0, 3)


@over_a_wire
def test_messages_of_a_claim_whose_answer_was_lost_are_hidden_no_longer_than_the_claim_ttl(
    service: Service, maker: ScriptedMaker
) -> None:
    ids = service.submit(5)
    service.fail({"claim"}, lose_first_of(service), times=2)
    with service.consumer(maker) as consumer:
        wait_until(lambda: FAILS in consumer.err)
        wait_until(lambda: IS_BACK in consumer.err)
        assert (service.take(service.request_queue), maker.requests) == ([], [])
        service.advance(CLAIM_TTL_S + 1)
        wait_for_responses(service, 5, consumer)
        log = stop(consumer)

    assert_all_made_once(service, maker, ids)
    assert (log.count(FAILS), log.count(IS_BACK)) == (1, 1)


def lose_first_of(service: Service) -> Callable[[Request], Raw]:
    """Lose the answers: of what was done at first, and of nothing after that."""
    left = iter([service.lose])

    def answer(request: Request) -> Raw:
        return next(left, lambda _: Raw(end="reset"))(request)

    return answer


# Settlements that are refused


@over_a_wire
@pytest.mark.parametrize("refused", ["post", "delete"])
def test_a_settlement_that_is_refused_is_asked_for_again_and_nothing_is_lost(
    service: Service, maker: ScriptedMaker, refused: str
) -> None:
    ids = service.submit(5)
    service.fail({refused}, Reply(503), times=4)
    with service.consumer(maker) as consumer:
        wait_until(lambda: IS_BACK in consumer.err)
        log = stop(consumer)

    assert len(maker.requests) == 5
    assert_all_made_once(service, maker, ids)
    assert_pauses(service)
    assert (log.count(FAILS), log.count(IS_BACK), log.count(LOST)) == (1, 1, 0)
    assert "doing=settle" in next(line for line in log.splitlines() if FAILS in line)


@pytest.mark.parametrize("service", parameters("sqs"), indirect=True)
def test_of_a_batch_delete_that_failed_half_only_that_half_is_asked_for_again(
    service: Service, maker: ScriptedMaker
) -> None:
    ids = service.submit(10)
    service.fail({"delete"}, failing_half_of(service), times=2)  # the adapter's own second attempt too
    with service.consumer(maker) as consumer:
        wait_until(lambda: IS_BACK in consumer.err)
        log = stop(consumer)

    asked = [len(request.json["Entries"]) for request in service.asked("delete")]
    assert sum(asked) > 10
    assert len(maker.requests) == service.count_responses() == 10
    assert_all_made_once(service, maker, ids)
    assert (log.count(FAILS), log.count(IS_BACK), log.count(LOST)) == (1, 1, 0)


def failing_half_of(service: Service) -> Callable[[Request], Reply]:
    """SQS that does every second entry of a batch and fails with the others."""

    def answer(request: Request) -> Reply:
        entries = request.json["Entries"]
        failing, done = entries[::2], entries[1::2]
        failed = [
            {"Id": each["Id"], "Code": "InternalError", "SenderFault": False, "Message": "no"} for each in failing
        ]
        if not done:
            return Reply(200, {"Failed": failed})
        body = json.dumps(request.json | {"Entries": done}).encode()
        return Reply(200, json.loads(service.serve(dataclasses.replace(request, body=body)).body) | {"Failed": failed})

    return answer


# A service that is down


@over_a_wire
@pytest.mark.parametrize("fault", ["refused", "503"])
def test_a_service_that_is_down_at_the_start_is_one_line_and_exit_1(service: Service, fault: str) -> None:
    mains = [widget_consumer.main, widget_producer.main]
    if fault == "refused":
        with service.down():
            ended = [call(main) for main in mains]
    else:
        service.fail(ALL, Reply(503))
        ended = [call(main) for main in mains]
        assert len(service.failed_at) <= 2 * 2  # SQS asks once more
        service.mend()

    assert [(each.code, each.out) for each in ended] == [(EXIT_FAILED, "")] * 2
    assert [(each.err.startswith("error: "), each.err.count("\n")) for each in ended] == [(True, 1)] * 2
    assert service.left() == (0, 0)


@over_a_wire
@pytest.mark.parametrize("fault", FAULTS)
def test_an_outage_of_the_service_costs_nothing_and_is_two_lines(
    service: Service, maker: ScriptedMaker, fault: str
) -> None:
    go_on = hold_back(maker)
    ids = service.submit(5)
    with service.consumer(maker) as consumer:
        wait_until(lambda: len(maker.requests) == 5)
        service.fail(ALL, FAULTS[fault])
        go_on.set()
        wait_until(lambda: "doing=settle" in consumer.err and "doing=claim" in consumer.err)
        ids += service.submit(5, first=5)
        wait_until(lambda: min(map(len, failed_times(service))) > 2)
        service.mend()
        wait_for_responses(service, 10, consumer)
        wait_until(lambda: consumer.err.count(IS_BACK) == 2)
        log = stop(consumer)

    assert len(maker.requests) == 10
    assert_all_made_once(service, maker, ids)
    assert_pauses(service)
    assert (log.count(FAILS), log.count(IS_BACK), log.count(LOST)) == (2, 2, 0)
    if fault == "429":
        assert_waits_as_asked(service)


def assert_pauses(service: Service) -> None:
    """Failing requests came in no quick succession: each kind by itself waits, ever longer."""
    times = service.failed_at
    assert times[-1] - times[0] >= 0.04 * (len(times) - 1), times


def assert_waits_as_asked(service: Service) -> None:
    """The service asked for patience, and was given it by claims and by settlements, each by itself."""
    for times in failed_times(service):
        assert min(later - earlier for earlier, later in pairwise(times)) >= RETRY_AFTER_S


def failed_times(service: Service) -> list[list[float]]:
    """When what concerns the request queue failed, which is claims, and the response queue, which is settlements."""
    both = list(zip(service.failed, service.failed_at, strict=False))
    return [
        [at for request, at in both if service.concerns(request, queue)]
        for queue in (service.request_queue, service.response_queue)
    ]


# Queues that go missing while a consumer runs


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget_consumer, "CHECK_QUEUES_EVERY_S", 0.1)


@over_a_wire
@pytest.mark.usefixtures("looks_often")
def test_a_request_queue_that_goes_missing_is_one_line_that_says_how_to_create_it(
    service: Service, maker: ScriptedMaker, here: Here, caplog: pytest.LogCaptureFixture
) -> None:
    with here.consuming():
        service.delete(service.request_queue)
        wait_until(lambda: FAILS in caplog.text)
        looked = len(service.asked("look"))
        wait_until(lambda: len(service.asked("look")) > looked + 6)
        service.create()
        wait_until(lambda: IS_BACK in caplog.text)
        ids = service.submit(3)
        wait_for_responses(service, 3)

    assert_all_made_once(service, maker, ids)
    (failing,) = (record for record in caplog.records if record.message == FAILS)
    assert failing.fields["reason"].startswith(f"queue {service.request_queue} does not exist at ")  # type: ignore[attr-defined]
    assert failing.fields["reason"].endswith("create it with --create")  # type: ignore[attr-defined]


@over_a_wire
@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("missing", ["request_queue", "response_queue"])
def test_a_queue_that_goes_missing_is_made_anew_with_create(
    service: Service, maker: ScriptedMaker, here: Here, missing: str
) -> None:
    go_on = hold_back(maker)
    ids = service.submit(1)
    with here.consuming(create=True):
        wait_until(lambda: len(maker.requests) == 1)
        service.delete(getattr(service, missing))
        go_on.set()
        wait_until(lambda: service.queues.exists(getattr(service, missing)))
        ids += service.submit(3, first=1)
        wait_for_responses(service, 4)

    assert_all_made_once(service, maker, ids)


@over_a_wire
@pytest.mark.usefixtures("looks_often")
def test_a_drain_of_a_queue_that_goes_missing_ends_and_says_how_to_create_it(
    service: Service, maker: ScriptedMaker
) -> None:
    with service.consumer_here(maker.url, drain=True) as consumer:
        service.delete(service.request_queue)
        with pytest.raises(QueueNotFound, match=f"queue {service.request_queue} .* create it with --create"):
            consumer.run()


# Credentials that are refused


@over_a_wire
def test_credentials_that_are_refused_once_are_renewed_unseen(service: Service, maker: ScriptedMaker) -> None:
    go_on = hold_back(maker)
    ids = service.submit(3)
    with service.consumer(maker) as consumer:
        wait_until(lambda: len(maker.requests) == 3)
        service.fail({"claim", "post", "delete"}, refusing_once_each(service))
        go_on.set()
        wait_until(lambda: {"claim", "post", "delete"} <= set(map(service.kind, service.failed)))
        wait_until(lambda: service.left() == (0, 0))
        log = stop(consumer)

    assert len(maker.requests) == 3
    assert_all_made_once(service, maker, ids)
    assert [line for line in log.splitlines() if " created " not in line] == [log.splitlines()[0], log.splitlines()[-1]]


def refusing_once_each(service: Service) -> Callable[[Request], Reply]:
    """Refuse the first request of each kind."""
    refused: set[str] = set()

    def answer(request: Request) -> Reply:
        kind = service.kind(request)
        if kind in refused:
            return service.serve(request)
        refused.add(kind)
        return service.refused

    return answer


@over_a_wire
def test_credentials_that_are_refused_for_ever_end_the_consumer_with_exit_4_and_nothing_is_lost(
    service: Service, maker: ScriptedMaker
) -> None:
    go_on = hold_back(maker)
    ids = service.submit(5)
    with service.consumer(maker) as refused:
        wait_until(lambda: len(maker.requests) == 5)
        service.fail(ALL, service.refused)
        go_on.set()
        assert refused.exit_code() == EXIT_CREDENTIALS
    asked = len(service.failed_at)
    service.mend()

    assert [line for line in refused.err.splitlines() if "error" in line] == refused.err.splitlines()[-1:]
    assert "Traceback" not in refused.err
    assert asked <= 12
    service.advance(CLAIM_TTL_S + 1)
    with service.consumer(maker) as another:
        wait_for_responses(service, 5, another)
        stop(another)
    assert_all_made_once(service, maker, ids)


# The producer


@over_a_wire
def test_a_post_that_is_accepted_half_is_reported_as_it_is_and_exit_6(service: Service) -> None:
    batch = service.queues.limits.post_batch
    service.fail({"post"}, accepting_one(service))
    ended = call(widget_producer.main, "--count", 2 * batch)
    service.mend()

    assert (ended.code, len(ended.lines)) == (EXIT_PARTLY_POSTED, batch)
    assert [f'{{"widget_id": "{line.split()[1]}"}}' for line in ended.lines] == [
        json.dumps(body) for body in service.take(service.request_queue)
    ]
    assert ended.err.count("not stored: ") == batch or f"stored the first {batch} requests and no more" in ended.err
    assert "Traceback" not in ended.err


def accepting_one(service: Service) -> Callable[[Request], Reply]:
    """Serve the first request, and be down from then on."""
    left = iter([service.serve])

    def answer(request: Request) -> Reply:
        return next(left, lambda _: Reply(503))(request)

    return answer
