"""Faults that users report of tools like this one: nobody is blamed who is not at fault, and nothing is lost."""

import resource
import threading
import time
from collections import Counter, deque
from email.utils import formatdate
from itertools import cycle
from pathlib import Path

import pytest
from doubles.scripted_maker import Answer, Post, Reply, ScriptedMaker
from doubles.tcp_proxy import Fault, TcpProxy
from rig import Rig, numbered
from support import under, wait_until

BACK = "failed, comes back"
OPENED = "the maker fails: trying it with one claim at a time"


# Connections


def test_connections_that_a_firewall_has_forgotten_cost_no_receive(rig: Rig) -> None:
    ids = numbered("w", 24)
    forgetful = TcpProxy("127.0.0.1", rig.maker.port, lambda n: Fault(rest_s=3, end="reset" if n % 2 else "hang"))
    rig.maker.answer = lambda post: time.sleep(0.2) or rig.maker.make(post)  # so that each slot opens one
    with forgetful, rig.consumer("--maker-url", f"http://127.0.0.1:{forgetful.port}/widgets") as consumer:
        rig.post(*ids[:12])
        wait_until(lambda: len(rig.responses()) == 12)
        time.sleep(3.5)
        rig.post(*ids[12:])
        wait_until(lambda: len(rig.responses()) == 24)

    assert [post.headers["X-Message-Receive-Count"] for post in rig.maker.posts] == ["1"] * 24
    assert consumer.events(BACK) == []


def test_one_deadline_covers_an_answer_that_trickles(rig: Rig) -> None:
    rig.post("w")
    trickling = TcpProxy("127.0.0.1", rig.maker.port, lambda n: Fault(trickle_s=0.5))
    urls = ["--maker-url", f"http://127.0.0.1:{trickling.port}/widgets", "--health-url", rig.maker.url]
    with trickling, rig.consumer(*urls, "--deadline", 1) as slow:
        wait_until(lambda: slow.events(BACK))
    [event] = slow.events(BACK)[:1]
    assert 900 < event["ms"] < 20_000
    assert (event["charged"], rig.left()) == (1 / 5, 1)


def test_interim_answers_are_skipped(rig: Rig) -> None:
    rig.post("w")
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\nHTTP/1.1 102 Processing\r\n\r\n"
    rig.maker.answer = lambda post: Reply(201, {"id": post.widget_id}, before=hints)

    rig.drain()

    assert (rig.outcomes(), len(rig.maker.posts)) == ({"w": "created"}, 1)


# Who asks for patience


def test_a_rate_limit_slows_the_consumer_down_and_costs_nothing(rig: Rig) -> None:
    ids = numbered("w", 90)
    rig.post(*ids)
    recent: deque[float] = deque()
    lock = threading.Lock()

    def thirty_a_second(post: Post) -> Answer:
        with lock:
            while recent and recent[0] < time.monotonic() - 1:
                recent.popleft()
            if len(recent) >= 30:
                return Reply(429, "slow down")
            recent.append(time.monotonic())
        return rig.maker.make(post)

    rig.maker.answer = thirty_a_second
    consumer = rig.drain("--max-receives", 2)

    assert rig.outcomes() == dict.fromkeys(ids, "created")
    assert sum(event["charged"] for event in consumer.events(BACK)) == 0
    assert len(rig.maker.posts) < 3 * len(ids)


def test_a_retry_after_that_is_a_date_is_obeyed_at_a_500(rig: Rig) -> None:
    def fail_once(post: Post) -> Answer:
        if len(rig.maker.posts) > 1:
            return rig.maker.make(post)
        return Reply(500, headers={"Retry-After": formatdate(time.time() + 3, usegmt=True)})

    rig.post("w")
    rig.maker.answer = fail_once

    rig.drain(hurry=False)

    first, second = (post.at for post in rig.maker.posts)
    assert second - first >= 1.9  # the date has no fractions


# Outages


def test_an_outage_costs_two_consumers_of_different_machines_nothing(rig: Rig) -> None:
    ids = numbered("w", 40)
    options = ["--drain", "--poll-interval", 0.1, "--max-receives", 2, "--receive-counts"]
    with rig.maker.down(), rig.consumer(*options, "one") as one, rig.consumer(*options, "other") as other:
        rig.post(*ids)
        rig.wait(lambda: one.events(OPENED) and other.events(OPENED))
        rig.maker.up()
        rig.wait(lambda: one.process.poll() is not None and other.process.poll() is not None)

    assert (one.exit_code(), other.exit_code()) == (0, 0)
    assert rig.outcomes() == dict.fromkeys(ids, "created")
    assert {event["charged"] for event in one.events(BACK) + other.events(BACK)} == {0}
    assert len(one.events(BACK)) >= 10
    assert one.events("the maker is back") + other.events("the maker is back")


def test_the_codes_of_gateways_that_cannot_reach_the_maker_are_not_its_own_word(rig: Rig) -> None:
    ids = numbered("w", 5)
    rig.post(*ids)
    codes = cycle([521, 524, 561, 598, 599, 502, 503, 504, 530])
    rig.maker.answer = lambda post: (
        Reply(next(codes), "<html>") if len(rig.maker.posts_of(post.widget_id)) < 4 else rig.maker.make(post)
    )

    consumer = rig.drain("--max-receives", 2)

    assert rig.outcomes() == dict.fromkeys(ids, "created")
    assert [event["charged"] for event in consumer.events(BACK)] == [1 / 5] * 3 * len(ids)


def test_a_health_page_that_is_wrong_is_not_believed_and_a_bad_message_still_ends(rig: Rig) -> None:
    rig.post("good", "bad")
    rig.maker.health = Reply(503)
    rig.maker.answer = lambda post: 500 if post.widget_id == "bad" else rig.maker.make(post)

    consumer = rig.drain("--max-receives", 2, "--slots", 1)

    assert rig.outcomes() == {"good": "created", "bad": "failed"}
    warned = "a widget was created, but this page is not well: ignored until it is"
    assert [event["url"] for event in consumer.events(warned)] == [f"http://127.0.0.1:{rig.maker.port}/healthz"]


# Wrong makers


def test_a_wrong_maker_url_costs_nothing_and_a_drain_gives_up(rig: Rig) -> None:
    rig.post(*numbered("w", 12))
    rig.maker.says_maker = False
    with ScriptedMaker() as elsewhere:
        wrong = cycle(
            [
                Reply(404, "<h1>Not found</h1>", {"Content-Type": "text/html"}),
                Reply(307, headers={"Location": elsewhere.url}),
                Reply(200, "<h1>Welcome</h1>", {"Content-Type": "text/html"}),
                Reply(401, {"error": {"code": "login", "message": "who are you?"}}),
                Reply(400, {"error": {"code": "BadRequest", "message": "no such operation"}}),
                Reply(200, {"id": "another"}),
            ]
        )
        rig.maker.answer = lambda post: next(wrong)
        consumer = rig.drain("--max-receives", 2, "--drain-timeout", 4, code=3)

        assert elsewhere.connections == 0
    assert len(rig.maker.posts) >= 6  # each wrong answer was given
    assert (rig.left(), rig.responses(), rig.letters()) == (12, [], [])
    assert {event["charged"] for event in consumer.events(BACK)} == {0}
    assert len(consumer.events(OPENED)) == 1
    assert "not drained within 4 s" in consumer.err


def test_neither_netrc_nor_proxies_nor_kubernetes_change_where_and_how_requests_go(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    rig.post("w")
    with ScriptedMaker() as proxy:
        at_proxy = f"http://127.0.0.1:{proxy.port}"
        env = dict.fromkeys(("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HTTPS_PROXY"), at_proxy)
        env |= {"WIDGET_METRICS_PORT": "tcp://10.0.0.5:5000", "WIDGET_PORT": "tcp://10.0.0.5:5000", "NETRC": ".netrc"}
        with rig.consumer("--drain", env=env) as consumer:
            assert consumer.exit_code() == 0, consumer.err
        assert proxy.connections == 0
    assert rig.outcomes() == {"w": "created"}
    assert {request.headers["Authorization"] for request in rig.maker.posts + rig.maker.gets} == {None}


# Some messages fail


def test_good_messages_behind_many_bad_ones_are_made_meanwhile(rig: Rig) -> None:
    good = numbered("good", 10)
    rig.post(*numbered("bad", 24), *good)
    rig.maker.answer = lambda post: 500 if post.widget_id.startswith("bad") else rig.maker.make(post)

    with rig.consumer("--poll-interval", 0.1) as consumer:
        rig.wait(lambda: sorted(rig.maker.made) == good, hurry=False)
        wait_until(lambda: len(consumer.events("created")) == 10)

    assert len(rig.letters()) < 24


# This machine


def test_slots_that_the_limit_of_open_files_cannot_bear_are_refused(rig: Rig) -> None:
    with rig.consumer("--slots", 64, prefix=under("ulimit -n 40")) as consumer:
        assert consumer.exit_code() == 2
    assert consumer.err.count("\n") == 1
    assert "ulimit -n" in consumer.err


def test_when_this_machine_is_out_of_descriptors_the_log_says_so_and_nothing_is_lost(rig: Rig) -> None:
    def make_the_first_and_let_no_file_be_opened_from_now_on(post: Post) -> Answer:
        if len(rig.maker.posts) > 1:
            return rig.maker.make(post)
        resource.prlimit(consumer.process.pid, resource.RLIMIT_NOFILE, (3, 4096))
        rig.post(*numbered("w", 5))
        return Reply(201, {"id": "first"}, {"Connection": "close"})

    rig.post("first")
    rig.maker.answer = make_the_first_and_let_no_file_be_opened_from_now_on
    with rig.consumer("--drain", "--poll-interval", 0.1, "--max-receives", 2) as consumer:
        rig.wait(lambda: len(consumer.events(BACK)) > 5)
        resource.prlimit(consumer.process.pid, resource.RLIMIT_NOFILE, (1024, 4096))
        rig.wait(lambda: consumer.process.poll() is not None)

    assert rig.outcomes() == dict.fromkeys(["first", *numbered("w", 5)], "created")
    assert "this machine: Too many open files" in consumer.events(BACK)[0]["reason"]


@pytest.mark.parametrize("what", ["queue", "counts"])
def test_a_file_that_is_removed_while_it_is_open_ends_the_consumer(rig: Rig, what: str) -> None:
    rig.post("w")
    with rig.consumer("--poll-interval", 0.1) as consumer:
        wait_until(rig.responses)
        file = rig.file if what == "queue" else rig.counts_file
        file.unlink()
        if what == "counts":
            rig.post("another")
        assert consumer.exit_code() == 5
    error = consumer.err.splitlines()[-1]
    assert (error[:7], str(file) in error, "Traceback" in consumer.err) == ("error: ", True, False)
    assert rig.maker.made == Counter(["w"])
