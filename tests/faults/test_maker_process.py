"""The maker as a process: signals, crashes, slow clients, a full disk, wrong options."""

import os
import resource
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import requests
from support import free_port, is_healthy, run_script, script, wait_until, widget_maker

from widget_maker import LONGEST_STOP_S

ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
WITHIN_S = 3.0


def post(url: str, widget_id: str = ID) -> requests.Response:
    return requests.post(f"{url}/widgets", json={"widget_id": widget_id}, timeout=20)


def number_n(number: int) -> str:
    return f"{number:08x}-54f4-11e5-ad75-3c970e65f731"


def processes(session: int) -> list[int]:
    """The processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(its_session) == session and state not in "ZX":
            found.append(int(path.parent.name))
    return sorted(found)


def serving_process(maker: Any) -> int:
    (serving,) = set(processes(maker.process.pid)) - {maker.process.pid}
    return serving


def half_sent(url: str, start: bytes, number: int) -> Iterator[socket.socket]:
    host, port = url.removeprefix("http://").split(":")
    for _ in range(number):
        connection = socket.create_connection((host, int(port)))
        connection.sendall(start)
        yield connection


def test_of_64_identical_posts_at_once_one_makes_the_widget(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, _), ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda _: post(url), range(64)))
        assert Counter(answer.status_code for answer in answers) == {201: 1, 200: 63}
        assert len({answer.content for answer in answers}) == 1
        assert len(requests.get(f"{url}/widgets", timeout=5).json()["widgets"]) == 1


def test_the_start_is_one_line_with_the_url(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker):
        (line,) = maker.err.splitlines()
        assert f"url={url}/" in line
        assert maker.out == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("whole_group", [False, True])
def test_a_signal_stops_it_at_once_and_leaves_no_process(tmp_path: Path, number: int, whole_group: bool) -> None:
    with widget_maker(tmp_path) as (url, maker), requests.Session() as idle:
        idle.get(f"{url}/healthz", timeout=5)
        (os.killpg if whole_group else os.kill)(maker.process.pid, number)
        assert maker.exit_code(LONGEST_STOP_S * 0.95) == 0
        assert processes(maker.process.pid) == []
        assert len(maker.err.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_its_first_line_stops_it_in_good_order(tmp_path: Path, number: int) -> None:
    options = ("--port", free_port(), "--database", tmp_path / "widgets.sqlite3")
    for _ in range(3):
        with script("widget_maker.py", *options, cwd=tmp_path) as maker:
            wait_until(lambda: "making widgets" in maker.err)
            maker.signal(number)
            assert maker.exit_code(WITHIN_S) == 0


def test_a_post_in_flight_is_answered_before_it_stops(tmp_path: Path) -> None:
    with widget_maker(tmp_path, "--latency", 0.5) as (url, maker), ThreadPoolExecutor() as pool:
        answer = pool.submit(post, url)
        wait_until(lambda: 'fault="latency"} 1.0' in requests.get(f"{url}/metrics", timeout=5).text)
        maker.signal(signal.SIGTERM)
        assert answer.result().status_code == 201
        assert maker.exit_code(WITHIN_S) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_maker_that_was_stopped_leaves_one_file(tmp_path: Path, number: int) -> None:
    with widget_maker(tmp_path) as (url, maker):
        post(url)
        assert (tmp_path / "widgets.sqlite3-wal").stat().st_size > 0
        maker.signal(number)
        assert maker.exit_code(WITHIN_S) == 0
    assert [path.name for path in tmp_path.glob("widgets.sqlite3*")] == ["widgets.sqlite3"]


def test_signals_in_quick_succession_stop_it_as_one_does(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (_, maker):
        for number in [signal.SIGINT, signal.SIGTERM, signal.SIGHUP] * 5:
            maker.signal(number)
        assert maker.exit_code(WITHIN_S) == 0
        assert processes(maker.process.pid) == []


def test_a_signal_stops_it_also_while_clients_stall_and_posts_wait(tmp_path: Path) -> None:
    with widget_maker(tmp_path, "--latency", 60) as (url, maker), ExitStack() as open_connections:
        body = b'{"widget_id": "%s"}' % ID.encode()
        head = b"POST /widgets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
        for start in (head, head + b"999\r\n\r\n{", head + b"%d\r\n\r\n" % len(body) + body):
            for connection in half_sent(url, start, 3):
                open_connections.enter_context(closing(connection))
        wait_until(lambda: 'fault="latency"} 3.0' in requests.get(f"{url}/metrics", timeout=5).text)
        maker.signal(signal.SIGTERM)
        assert maker.exit_code(WITHIN_S) == 0
        assert processes(maker.process.pid) == []


def test_sigkill_leaves_no_process_either(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker):
        assert len(processes(maker.process.pid)) == 2
        maker.process.kill()
        wait_until(lambda: not processes(maker.process.pid), WITHIN_S)
        assert not is_healthy(url)


def test_a_serving_process_that_dies_ends_the_maker_with_exit_1(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (_, maker):
        os.kill(serving_process(maker), signal.SIGKILL)
        assert maker.exit_code() == 1
        assert maker.err.splitlines()[-1] == "error: serving ended by itself: the log above says why"
        assert "Traceback" not in maker.err


def test_widgets_outlive_sigkill(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker):
        made = [post(url, number_n(number)).json() for number in range(20)]
        maker.kill()
    with widget_maker(tmp_path) as (url, _):
        assert requests.get(f"{url}/widgets", timeout=5).json()["widgets"] == made[::-1]
        assert post(url, number_n(0)).status_code == 200


def test_a_port_in_use_is_one_line_and_exit_1(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, _):
        port = url.rpartition(":")[2]
        ended = run_script("widget_maker.py", "--port", port, "--database", tmp_path / "other", cwd=tmp_path)
        assert (ended.returncode, ended.stdout) == (1, "")
        assert ended.stderr == f"error: cannot listen at 127.0.0.1 port {port}: Address already in use\n"
        assert is_healthy(url)


def test_it_can_be_started_again_at_the_same_port_at_once(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker), requests.Session() as connected:
        connected.get(f"{url}/healthz", timeout=5)
        maker.signal(signal.SIGTERM)
        maker.exit_code()
        with widget_maker(tmp_path, port=int(url.rpartition(":")[2])) as (again, _):
            assert post(again).status_code == 201


@pytest.mark.parametrize(
    "start",
    [
        b"POST /widgets HTTP/1.1\r\nHost: localhost\r\nContent-Le",
        b"POST /widgets HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 999\r\n\r\n{",
    ],
    ids=["headers", "body"],
)
def test_100_half_sent_requests_block_nobody(tmp_path: Path, start: bytes) -> None:
    with widget_maker(tmp_path) as (url, _), ExitStack() as open_connections:
        for connection in half_sent(url, start, 100):
            open_connections.enter_context(closing(connection))
        began = time.monotonic()
        assert is_healthy(url)
        assert post(url).status_code == 201
        assert time.monotonic() - began < WITHIN_S


def test_a_full_disk_is_answered_503_and_the_page_can_be_read(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, maker):
        post(url)
        serving = serving_process(maker)
        limits = resource.prlimit(serving, resource.RLIMIT_FSIZE)
        resource.prlimit(serving, resource.RLIMIT_FSIZE, (4096, limits[1]))
        refused = post(url, number_n(1))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "store_unavailable")
        assert refused.headers["Retry-After"] == "1"
        assert requests.get(f"{url}/healthz", timeout=5).status_code == 503
        assert ID in requests.get(f"{url}/", timeout=5).text
        resource.prlimit(serving, resource.RLIMIT_FSIZE, limits)
        assert is_healthy(url)
        assert post(url, number_n(1)).status_code == 201
        assert "Traceback" not in maker.err


def test_the_page_and_its_style_are_found_from_any_directory(tmp_path: Path) -> None:
    with widget_maker(tmp_path) as (url, _):
        assert "Widget maker" in requests.get(url, timeout=5).text
        style = requests.get(f"{url}/static/widgets.css", timeout=5)
        assert (style.status_code, style.headers["Content-Type"]) == (200, "text/css; charset=utf-8")
        assert style.headers["Server"] == "granian"


def test_faults_and_hosts_can_be_set_by_options_and_by_the_environment(tmp_path: Path) -> None:
    port = free_port()
    options = ["--port", port, "--fail-rate", 1, "--fault-id", ID.upper(), "--fault-id", number_n(2)]
    env = {"WIDGET_OUTAGE": "0:2", "WIDGET_ALLOWED_HOST": "Widgets.example other.example"}
    with script("widget_maker.py", *options, cwd=tmp_path, env=env):
        url = f"http://127.0.0.1:{port}"
        page = {"url": f"{url}/", "timeout": 5}
        wait_until(lambda: "Error" not in type(maker_answers(page)).__name__)
        assert post(url, number_n(1)).status_code == 503
        wait_until(lambda: is_healthy(url))
        statuses = [post(url, widget_id).status_code for widget_id in (ID, number_n(1), number_n(2))]
        assert statuses == [500, 201, 500]
        for host, status in (("widgets.example", 200), ("other.example:80", 200), ("evil.example", 421)):
            assert requests.get(**page, headers={"Host": host}).status_code == status
        assert (tmp_path / "state" / "itchy-octo-chainsaw" / "widgets.sqlite3").exists()


def maker_answers(page: dict[str, Any]) -> object:
    try:
        return requests.get(**page)
    except requests.ConnectionError as error:
        return error


@pytest.mark.parametrize("host", ["localhost", "::1", "127.0.0.2"])
def test_it_listens_where_it_is_told_and_answers_to_that_name(tmp_path: Path, host: str) -> None:
    port = free_port()
    with script("widget_maker.py", "--host", host, "--port", port, cwd=tmp_path) as maker:
        name = f"[{host}]" if ":" in host else host
        wait_until(lambda: is_healthy(f"http://{name}:{port}") or maker.process.poll() is not None)
        assert maker.process.poll() is None, maker.err


@pytest.mark.parametrize(
    "options",
    [
        ["--port", "0"],
        ["--port", "65536"],
        ["--port", "http"],
        ["--fail-rate", "1.1"],
        ["--fail-rate", "-1"],
        ["--fail-rate", "nan"],
        ["--latency", "-1"],
        ["--latency", "3601"],
        ["--outage", "5"],
        ["--outage", "5:"],
        ["--outage", "a:b"],
        ["--outage", "1:2:3"],
        ["--allowed-host", "http://x"],
        ["--allowed-host", "x:80"],
        ["--allowed-host", ""],
        ["--log-format", "xml"],
        ["--debug"],
        ["surplus"],
    ],
    ids=" ".join,
)
def test_a_wrong_option_is_one_line_and_exit_2(tmp_path: Path, options: list[str]) -> None:
    ended = run_script("widget_maker.py", *options, cwd=tmp_path)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_host_that_is_not_there_is_one_line_and_exit_1(tmp_path: Path) -> None:
    ended = run_script("widget_maker.py", "--host", "no.such.invalid", cwd=tmp_path)
    assert ended.returncode == 1
    assert len(ended.stderr.splitlines()) == 1
    assert "no.such.invalid" in ended.stderr


@pytest.mark.parametrize("database", ["missing/widgets.sqlite3", ".", "text"])
def test_a_database_that_cannot_be_used_is_one_line_and_exit_5(tmp_path: Path, database: str) -> None:
    (tmp_path / "text").write_text("this is no database, and nobody may change it\n" * 100)
    ended = run_script("widget_maker.py", "--port", free_port(), "--database", database, cwd=tmp_path)
    assert ended.returncode == 5
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    assert (tmp_path / "text").read_text().startswith("this is no database")


def test_the_version_is_shown(tmp_path: Path) -> None:
    ended = run_script("widget_maker.py", "--version", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
