"""The consumer as a process: a request's whole way, signals, crashes, batches, --check."""

import re
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from doubles.scripted_maker import Post, Reply, ScriptedMaker, Silence
from rig import REQUESTS, Rig, numbered
from support import under, wait_until

# One request's way


def test_a_request_is_posted_with_its_message_answered_deleted_and_forgotten(rig: Rig) -> None:
    request = {"widget_id": "a", "colour": "grün", "count": 2**53}
    [message_id] = rig.post_bodies(request)
    with rig.consumer("--poll-interval", 0.1) as consumer:
        rig.wait(lambda: rig.responses() and not rig.left())
        consumer.signal(signal.SIGTERM)
        assert consumer.exit_code() == 0

    [post] = rig.maker.posts
    [response] = rig.responses()
    assert (post.path, post.json) == ("/widgets", request)
    assert (post.headers["Idempotency-Key"], post.headers["webhook-id"]) == (message_id, message_id)
    assert post.headers["X-Message-Receive-Count"] == "1"
    assert post.headers["X-Message-Queue"] == "itchy-octo-chainsaw-request"
    assert int(post.headers["X-Message-Age"]) < 60
    assert (response["request_id"], response["widget_id"], response["outcome"]) == (message_id, "a", "created")
    assert rig.counted() == 0
    assert [event["outcome"] for event in consumer.events("created")] == ["created"]
    assert (consumer.out, "Traceback" in consumer.err) == ("", False)


def test_what_always_fails_is_a_dead_letter_after_max_receives_while_others_pass(rig: Rig) -> None:
    [bad_id, *_] = rig.post("bad", *numbered("good", 9))
    rig.maker.answer = lambda post: 500 if post.widget_id == "bad" else rig.maker.make(post)

    drained = rig.drain("--max-receives", 3)

    [letter] = rig.letters()
    assert letter["first_received_at"] < letter["last_received_at"]
    assert (letter["request_id"], letter["body"], letter["receive_count"]) == (bad_id, {"widget_id": "bad"}, 3)
    assert letter["reason"] == "HTTP 500: scripted 500"
    assert [post.headers["X-Message-Receive-Count"] for post in rig.maker.posts_of("bad")] == ["1", "2", "3"]
    assert rig.outcomes() == {"bad": "failed"} | dict.fromkeys(numbered("good", 9), "created")
    assert [(event["created"], event["failed"]) for event in drained.events("drained")] == [(9, 1)]
    assert rig.counted() == 0


# Signals


def test_the_first_signal_lets_posts_end_and_frees_the_rest_at_once(rig: Rig) -> None:
    go_on = threading.Event()
    rig.post(*numbered("quick", 4))
    rig.maker.answer = lambda post: (post.widget_id < "r" or go_on.wait(30)) and rig.maker.make(post)
    with rig.consumer("--slots", 2, "--poll-interval", 0.1) as consumer:
        wait_until(lambda: len(rig.responses()) == 4)  # it knows now that its maker is quick, and claims more at once
        rig.post(*numbered("slow", 10))
        wait_until(lambda: len(rig.maker.posts) == 4 + 2 and rig.queues.stats(REQUESTS).claimed > 2)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # at once, as GNU timeout sends two: they are one
            consumer.signal(number)
        wait_until(lambda: "stopping" in consumer.err)
        go_on.set()
        assert consumer.exit_code() == 0

    assert len(rig.maker.made) == len(rig.responses()) == 4 + 2
    assert rig.queues.stats(REQUESTS).free == 8
    assert rig.counted() == 0


def test_a_second_signal_ends_the_consumer_at_once(rig: Rig) -> None:
    rig.post("w")
    rig.maker.answer = lambda post: rig.maker.hang()
    with rig.consumer("--deadline", 60) as consumer:
        wait_until(lambda: rig.maker.posts)
        consumer.signal(signal.SIGTERM)
        # Those that come too soon to be a second one change nothing.
        wait_until(lambda: consumer.signal(signal.SIGTERM) or consumer.process.poll() is not None)
        assert consumer.exit_code() == 143
    assert rig.left() == 1


def test_a_signal_ends_a_consumer_that_waits_for_its_maker(rig: Rig) -> None:
    rig.post(*numbered("w", 12))
    with rig.consumer("--maker-url", "http://127.0.0.1:1/widgets") as waiting:
        rig.wait(lambda: waiting.events("the maker fails: trying it with one claim at a time"))
        waiting.signal(signal.SIGTERM)
        assert waiting.exit_code() == 0
    assert (rig.left(), rig.queues.stats(REQUESTS).claimed) == (12, 0)


def test_signals_that_were_ignored_at_the_start_stay_ignored(rig: Rig) -> None:
    rig.post("w")
    with rig.consumer(prefix=under("trap '' HUP INT")) as consumer:
        wait_until(rig.responses)
        ignored = re.findall(r"SigIgn:\t(\w+)", Path(f"/proc/{consumer.process.pid}/status").read_text())
    assert int(ignored[0], 16) & 0b11 == 0b11  # a bit for each signal, from 1, which is HUP


# Crashes


@pytest.mark.parametrize("most", [2, 3])
def test_a_message_that_kills_its_consumer_is_posted_max_receives_times_and_takes_no_other_along(
    rig: Rig, most: int
) -> None:
    rig.post("w0", "killer", *numbered("x", 8))

    def kill(post: Post) -> Reply:
        if post.widget_id == "killer":
            running.process.send_signal(signal.SIGKILL)
        return rig.maker.make(post)

    rig.maker.answer = kill
    for _ in range(most):
        with rig.consumer("--slots", 4, "--max-receives", most) as running:
            assert running.exit_code() == -signal.SIGKILL
        rig.end_claims()
    with rig.consumer("--slots", 4, "--max-receives", most, "--drain", "--poll-interval", 0.1) as running:
        rig.wait(lambda: running.process.poll() is not None)

    assert rig.dead() == ["killer"]
    assert len(rig.maker.posts_of("killer")) == most
    assert rig.outcomes() == {"killer": "failed"} | dict.fromkeys(["w0", *numbered("x", 8)], "created")


@pytest.mark.slow
def test_a_message_that_kills_the_maker_becomes_a_dead_letter_and_takes_no_other_along(rig: Rig) -> None:
    rig.post("w0", "killer", *numbered("x", 18))

    def die(post: Post) -> Reply | Silence:
        if post.widget_id != "killer":
            time.sleep(0.05)  # so that others are under way
            return rig.maker.make(post)
        with rig.maker.down():
            if len(rig.maker.posts_of("killer")) == 1:  # away until the killer was refused once, which charges nothing
                rig.wait(refused)
            else:
                time.sleep(0.3)
        return Silence.CUT

    def refused() -> list[Any]:
        failed = running.events("failed, comes back")
        return [event for event in failed if event["widget"] == "killer" and "connect" in event["reason"]]

    rig.maker.answer = die
    with rig.consumer("--drain", "--poll-interval", 0.1, "--max-receives", 3) as running:
        rig.wait(lambda: running.process.poll() is not None)

    assert rig.dead() == ["killer"]
    assert len(rig.maker.posts_of("killer")) == 2 + 3  # charged once it is POSTed alone
    assert rig.outcomes() == {"killer": "failed"} | dict.fromkeys(["w0", *numbered("x", 18)], "created")


def test_a_consumer_whose_claim_was_lost_stores_no_second_outcome(rig: Rig) -> None:
    rig.post("w")
    go_on = threading.Event()
    rig.maker.answer = lambda post: go_on.wait(30) and rig.maker.make(post)
    with rig.consumer() as loser:
        wait_until(lambda: rig.maker.posts)
        rig.end_claims()
        with rig.consumer("--drain", "--poll-interval", 0.1) as winner:
            wait_until(lambda: len(rig.maker.posts) == 2)
            go_on.set()
            assert winner.exit_code() == 0
        wait_until(lambda: "claim lost" in loser.err)
        loser.signal(signal.SIGTERM)
        assert loser.exit_code() == 0
    assert rig.outcomes() == {"w": "created"}


def test_a_message_that_was_received_before_is_posted_once_per_receive(rig: Rig) -> None:
    ids = numbered("w", 8)
    rig.post(*ids)
    used: set[int] = set()

    def close_what_was_used_before(post: Post) -> Reply | int | Silence:
        if post.connection in used:
            return Silence.CUT
        used.add(post.connection)
        return rig.maker.make(post) if int(post.headers["X-Message-Receive-Count"]) > 3 else 503

    rig.maker.answer = close_what_was_used_before
    rig.drain("--slots", 2, "--max-receives", 10)

    seen = Counter((post.widget_id, int(post.headers["X-Message-Receive-Count"])) for post in rig.maker.posts)
    counts = {response["widget_id"]: response["receive_count"] for response in rig.responses()}
    # At its first receive it may go out on a kept connection, and once more on a new one where that was closed.
    again = [(id_, receive) for (id_, receive), number in seen.items() if receive > 1 and number > 1]
    assert again == []
    assert {id_: max(count for found, count in seen if found == id_) for id_ in ids} == counts


# Batches


def test_each_request_of_a_batch_is_judged_by_itself(rig: Rig) -> None:
    good = numbered("good", 16)
    rig.post("bad", "left out", "rejected", *good)

    def answer(post: Post) -> Reply | int | Silence:
        if post.widget_id == "left out" and not any(each.widget_ids == ["left out"] for each in rig.maker.posts):
            return Silence.LEFT_OUT
        return {"bad": 500, "rejected": 422}.get(post.widget_id) or rig.maker.make(post)

    rig.maker.answer = answer
    rig.drain("--post-batch", 4, "--slots", 1, "--max-receives", 3)

    first, *_ = rig.maker.posts
    assert (first.path, first.widget_ids) == ("/widgets/batch", ["bad", "left out", "rejected", "good0"])
    assert [(item["receive_count"], item["age"] < 60) for item in first.json] == [(1, True)] * 4
    again = [post for post in rig.maker.posts if not post.is_batch]
    assert [post.headers["X-Message-Receive-Count"] for post in again if post.widget_id == "left out"] == ["2"]
    assert rig.dead() == ["bad"]
    assert rig.outcomes() == {"bad": "failed", "rejected": "rejected"} | dict.fromkeys(["left out", *good], "created")
    assert rig.maker.made == Counter(["left out", *good])


def test_a_maker_that_knows_no_batches_gets_one_and_then_single_requests(rig: Rig) -> None:
    ids = numbered("w", 12)
    rig.post(*ids)
    rig.maker.takes_batches = False

    rig.drain("--post-batch", 4, "--slots", 1)

    assert [post.is_batch for post in rig.maker.posts] == [True, *[False] * 12]
    assert rig.maker.made == Counter(ids)


# --check


def test_check_says_what_is_wrong_and_takes_no_message(rig: Rig) -> None:
    rig.post("w")
    rig.maker.answer = lambda post: Reply(422, {"error": {"code": "bad_id", "message": "no such shape"}})
    with rig.consumer("--check") as well:
        assert well.exit_code() == 0, well.out
    assert [post.json for post in rig.maker.posts] == [{"widget_id": ""}]

    rig.maker.says_maker = False  # another API that answers so
    with rig.consumer("--check") as foreign:
        assert foreign.exit_code() == 1
    with rig.consumer("--check", "--maker-url", rig.maker.url + "/elsewhere", "--health-url", rig.maker.url) as sick:
        rig.maker.answer = lambda post: Reply(404)
        assert sick.exit_code() == 1
    with ScriptedMaker() as gone:
        pass
    with rig.consumer("--check", "--maker-url", gone.url) as alone:
        assert alone.exit_code() == 1

    assert "Widget-Maker" in foreign.out
    assert "404" in sick.out
    assert gone.url in alone.out
    assert (rig.left(), rig.responses()) == (1, [])
