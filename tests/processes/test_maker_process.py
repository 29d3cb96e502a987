"""The maker as a process: signals, crashes, slow clients, files that are full or gone, wrong options."""

import json
import os
import resource
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path

import apsw
import pytest
import requests
from support import (
    ANSWER_S,
    free_port,
    is_healthy,
    nth_id,
    run_script,
    script,
    status,
    under,
    wait_until,
    widget_maker,
    widgets,
)

ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
BODY = json.dumps({"widget_id": ID}).encode()
HEAD = b"POST /widgets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def post(url: str, widget_id: str = ID) -> requests.Response:
    return requests.post(f"{url}/widgets", json={"widget_id": widget_id}, timeout=ANSWER_S)


@contextmanager
def connected(url: str, *texts: bytes) -> Iterator[list[socket.socket]]:
    """A connection for each text, which is sent and not more."""
    host, port = url.removeprefix("http://").split(":")
    found = []
    try:
        for text in texts:
            found.append(socket.create_connection((host, int(port)), timeout=ANSWER_S))
            found[-1].sendall(text)
        yield found
    finally:
        for connection in found:
            connection.close()


def answer_to(url: str, text: bytes) -> str:
    """All that comes back until the maker closes the connection."""
    with connected(url, text) as (connection,), closing(connection.makefile("rb")) as received:
        return received.read().decode()


def has_counted(url: str, sample: str) -> bool:
    return sample in requests.get(f"{url}/metrics", timeout=ANSWER_S).text


def test_300_half_sent_requests_keep_nobody_waiting(tmp_path: Path) -> None:
    starts = [HEAD + b"Content-Le", HEAD + b"Content-Length: 999\r\n\r\n{", b""] * 100
    with widget_maker(tmp_path) as (url, _), connected(url, *starts):
        for number in range(20):
            assert requests.get(f"{url}/healthz", timeout=ANSWER_S).status_code == 200
            assert post(url, nth_id(number)).status_code == 201


def test_posts_that_are_kept_waiting_on_purpose_keep_neither_a_probe_nor_a_stop_waiting(tmp_path: Path) -> None:
    whole = HEAD + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
    starts = [HEAD, HEAD + b"Content-Length: 999\r\n\r\n{", *[whole] * 40]
    with widget_maker(tmp_path, "--latency", 60) as (url, maker), connected(url, *starts):
        wait_until(lambda: has_counted(url, 'fault="latency"} 40.0'))
        assert requests.get(f"{url}/healthz", timeout=ANSWER_S).status_code == 200
        for _ in range(5):  # in quick succession, as from a terminal and a supervisor
            maker.signal(signal.SIGTERM)
        assert maker.exit_code(ANSWER_S) == 0


def test_a_body_in_chunks_is_taken_once_it_is_whole_and_a_cut_one_never(tmp_path: Path) -> None:
    head = HEAD + b"Transfer-Encoding: chunked\r\nConnection: close\r\n"
    chunk = b"\r\n%x\r\n%s\r\n" % (len(BODY), BODY)
    with widget_maker(tmp_path) as (url, _):
        with connected(url, head + chunk, head + chunk + b"5\r\nab") as cut:
            for connection in cut:
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1000) == b""
        assert not answer_to(url, head + chunk + b"no length\r\n").startswith("HTTP/1.1 20")
        assert widgets(url) == []
        for length in (b"", b"Content-Length: 5\r\n"):
            text = head.replace(b"Connection", length + b"Connection") + chunk + b"0\r\n\r\n"
            assert answer_to(url, text).startswith("HTTP/1.1 20")
        assert widgets(url) == [ID]


def test_a_request_that_is_too_large_is_rejected_in_the_makers_own_words(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, _):
        headers = {"Content-Type": "application/json"}
        answer = requests.post(f"{url}/widgets", data=BODY.ljust(1_000_000), headers=headers, timeout=ANSWER_S)
        assert (answer.status_code, answer.headers["Widget-Maker"]) == (413, "1")
        assert answer.json()["error"]["code"] == "request_entity_too_large"


def test_what_is_not_http_is_refused_by_no_answer_that_would_reject_a_request(tmp_path: Path) -> None:
    far_too_large = HEAD + b"Content-Length: 999999999\r\n\r\n"
    with widget_maker(tmp_path) as (url, maker):
        for text in (b"\x16\x03\x01\x02\x00\r\n\r\n", HEAD + b"Content-Length: -1\r\n\r\n", far_too_large):
            head, _, body = answer_to(url, text).partition("\r\n\r\n")
            assert head.startswith("HTTP/1.")
            assert "widget-maker" not in head.lower()
            assert "{" not in body
        head = answer_to(url, b"GET /healthz HTTP/1.0\r\n\r\n")  # as of a probe, which names no host
        assert head.startswith("HTTP/1.0 200 ")
        assert "\r\nServer:" not in head
        assert "Traceback" not in maker.err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_stops_it_soon_and_leaves_one_file_and_one_line_of_log(tmp_path: Path, number: int) -> None:
    with widget_maker(tmp_path) as (url, maker), requests.Session() as idle:
        idle.post(f"{url}/widgets", json={"widget_id": ID}, timeout=ANSWER_S)
        assert (tmp_path / "widgets.sqlite3-wal").stat().st_size > 0
        os.killpg(maker.process.pid, number)
        assert maker.exit_code(ANSWER_S) == 0
    assert [path.name for path in tmp_path.glob("widgets.sqlite3*")] == ["widgets.sqlite3"]
    assert len(maker.err.splitlines()) == 1
    assert f"making widgets url={url}/" in " ".join(maker.err.split())
    assert maker.out == ""


def test_a_post_in_flight_is_answered_before_it_stops(tmp_path: Path) -> None:
    with widget_maker(tmp_path, "--latency", 0.5) as (url, maker), ThreadPoolExecutor() as pool:
        answer = pool.submit(post, url)
        wait_until(lambda: has_counted(url, 'fault="latency"} 1.0'))
        maker.signal(signal.SIGTERM)
        assert answer.result().status_code == 201
        assert maker.exit_code(ANSWER_S) == 0


def test_under_nohup_it_outlives_sighup(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with script("widget_maker.py", "--port", port, cwd=tmp_path, prefix=under("trap '' HUP")) as maker:
        wait_until(lambda: is_healthy(url))
        maker.signal(signal.SIGHUP)
        assert [post(url, nth_id(number)).status_code for number in range(20)] == [201] * 20
        maker.signal(signal.SIGTERM)
        assert maker.exit_code(ANSWER_S) == 0


def test_widgets_outlive_sigkill_and_it_can_be_started_again_at_the_same_port_at_once(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker):
        made = [nth_id(number) for number in range(9)]
        assert [post(url, id_).status_code for id_ in made] == [201] * 9
        maker.kill()
        with widget_maker(tmp_path, port=int(url.rpartition(":")[2])) as (again, _):
            assert widgets(again) == made[::-1]


def test_a_port_in_use_and_a_host_that_is_not_there_are_one_line_and_exit_1(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, _):
        port = url.rpartition(":")[2]
        for options, says in ((["--port", port], "Address already in use"), (["--host", "no.such.invalid"], "no.such")):
            ended = run_script("widget_maker.py", *options, "--database", tmp_path / "other", cwd=tmp_path)
            assert (ended.returncode, ended.stdout) == (1, "")
            assert ended.stderr.startswith("error: cannot listen at ")
            assert len(ended.stderr.splitlines()) == 1
            assert says in ended.stderr
        assert is_healthy(url)


def test_a_full_disk_is_answered_503_and_the_page_can_be_read(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker):
        post(url)
        limits = resource.prlimit(maker.process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(maker.process.pid, resource.RLIMIT_FSIZE, (4096, limits[1]))
        refused = post(url, nth_id(1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["Retry-After"] == "1"
        assert "sqlite" not in refused.text
        assert requests.get(f"{url}/healthz", timeout=ANSWER_S).status_code == 503
        assert ID in requests.get(f"{url}/", timeout=ANSWER_S).text
        resource.prlimit(maker.process.pid, resource.RLIMIT_FSIZE, limits)
        assert is_healthy(url)
        assert post(url, nth_id(1)).status_code == 201
        assert "Traceback" not in maker.err


@pytest.mark.slow
def test_a_file_that_another_process_keeps_locked_is_answered_503_and_ends_nothing(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker), ThreadPoolExecutor(8) as pool:
        with closing(apsw.Connection(str(tmp_path / "widgets.sqlite3"))) as other_process:
            other_process.execute("BEGIN IMMEDIATE")
            answers = [answer.status_code for answer in pool.map(post, [url] * 16)]
        assert answers == [503] * 16
        assert maker.process.poll() is None
        assert post(url).status_code == 201


def test_a_file_that_is_removed_ends_it_with_exit_5(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (_, maker):
        (tmp_path / "widgets.sqlite3").rename(tmp_path / "kept.sqlite3")
        assert maker.exit_code() == 5
        assert maker.err.splitlines()[-1].startswith("error: ")
        assert "Traceback" not in maker.err


def test_faults_and_hosts_can_be_set_by_options_and_by_the_environment(tmp_path: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = ["--port", port, "--fail-rate", 1, "--fault-id", ID.upper(), "--fault-id", nth_id(2)]
    with script("widget_maker.py", *options, cwd=tmp_path, env={"WIDGET_OUTAGE": "0:1000"}):
        wait_until(lambda: status(f"{url}/healthz") == 503)
        assert post(url, nth_id(1)).status_code == 503
    env = {"WIDGET_OUTAGE": "0:0", "WIDGET_ALLOWED_HOST": "Widgets.example other.example"}
    with script("widget_maker.py", *options, cwd=tmp_path, env=env):
        wait_until(lambda: is_healthy(url))
        statuses = [post(url, widget_id).status_code for widget_id in (ID, nth_id(1), nth_id(2))]
        assert statuses == [500, 201, 500]
        for host, code in (("widgets.example", 200), ("other.example:80", 200), ("evil.example", 421)):
            assert requests.get(f"{url}/", headers={"Host": host}, timeout=ANSWER_S).status_code == code
    assert (tmp_path / "state" / "itchy-octo-chainsaw" / "widgets.sqlite3").exists()


@pytest.mark.parametrize("host", ["localhost", "::1"])
def test_it_listens_where_it_is_told_and_answers_to_that_name(tmp_path: Path, host: str) -> None:
    port = free_port()
    name = f"[{host}]" if ":" in host else host
    with script("widget_maker.py", "--host", host, "--port", port, cwd=tmp_path):
        wait_until(lambda: is_healthy(f"http://{name}:{port}"))
        assert requests.get(f"http://{name}:{port}/widgets", timeout=ANSWER_S).status_code == 200
