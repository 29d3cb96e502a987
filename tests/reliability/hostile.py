"""Hostile clients of the maker: they stall, send nonsense, or script."""

import json
import re
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

import requests
from fault_proxy import FaultProxy
from scripted_maker import RESET, Raw, Reply, Request
from support import free_port, is_healthy, wait_until, widget_maker, widgets

from .campaign import Campaign, Result

ID = "31f37378-54f4-11e5-ad75-3c970e65f731"
STALLED = 300
HEALTHY_WITHIN_S = 0.5
HEAD_TIMEOUT_S, HEAD_SPARE_S = 30.0, 3.0
HOST = b"Host: localhost\r\n"
POST = b"POST /widgets HTTP/1.1\r\n" + HOST + b"Content-Type: application/json\r\n"
BODY = b'{"widget_id": "%s"}' % ID.encode()
GET = b"GET /healthz HTTP/1.1\r\n" + HOST


def connect(url: str) -> socket.socket:
    host, _, port = url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10)


# Stalled connections

STALLS = {
    "nothing": b"",
    "half a head": POST + b"Content-Le",
    "a head without its body": POST + b"Content-Length: 60\r\n\r\n",
    "half a body": POST + b"Content-Length: 60\r\n\r\n{",
    "half a chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\n{",
    "a trickled head": POST,
    "silence after an answer": GET + b"\r\n",
}
BODIES = {"a head without its body", "half a body", "half a chunk"}
"""Nothing ends these: granian has no time limit for bodies."""


def stalled_clients(scale: float) -> Result:
    """Connections that stall in every way, and how long /healthz takes meanwhile; at full size until they are gone."""
    count = max(len(STALLS), round(STALLED * scale))
    is_full = scale >= 1
    dropped: dict[str, list[float]] = {kind: [] for kind in STALLS}
    latencies: list[float] = []
    with (
        tempfile.TemporaryDirectory() as directory,
        widget_maker(Path(directory)) as (url, maker),
        ExitStack() as stack,
    ):
        stalled = []
        for number in range(count):
            kind = list(STALLS)[number % len(STALLS)]
            connection = stack.enter_context(connect(url))
            connection.sendall(STALLS[kind])
            connection.setblocking(False)
            stalled.append((kind, connection, time.monotonic()))
        session = stack.enter_context(requests.Session())
        ends_at = time.monotonic() + (HEAD_TIMEOUT_S + HEAD_SPARE_S if is_full else 1)
        trickle_at = 0.0
        while time.monotonic() < ends_at:
            started = time.monotonic()
            assert session.get(f"{url}/healthz", timeout=20).status_code == requests.codes.ok
            latencies.append(time.monotonic() - started)
            if started >= trickle_at:
                trickle_at = started + 1
                trickle([connection for kind, connection, _ in stalled if kind == "a trickled head"])
            stalled = [each for each in stalled if not is_dropped(*each, dropped)]
            time.sleep(0.02)
        made_while_stalled = session.post(f"{url}/widgets", json={"widget_id": ID}, timeout=20).status_code
        left = Counter(kind for kind, _, _ in stalled)
        log = maker.err
    p99 = statistics.quantiles(latencies, n=100)[98]
    violations = [] if p99 < HEALTHY_WITHIN_S else [f"/healthz: {p99:.3f} s at the 99th percentile"]
    if made_while_stalled != requests.codes.created:
        violations.append(f"a POST meanwhile is answered {made_while_stalled}")
    if is_full:
        violations += [f"{kind}: {left[kind]} are still there" for kind in left if kind not in BODIES]
        late = {kind: max(times) for kind, times in dropped.items() if times and max(times) > HEAD_TIMEOUT_S + 1}
        violations += [f"{kind}: dropped after {seconds:.1f} s" for kind, seconds in late.items()]
    if "Traceback" in log:
        violations.append(log[-2_000:])
    figures: dict[str, int | float | str] = {"n": count, "healthz p99, ms": round(p99 * 1000, 1)}
    figures |= {"healthz max, ms": round(max(latencies) * 1000, 1), "asked": len(latencies)}
    figures |= {f"{kind}: dropped after s": round(max(times), 1) for kind, times in dropped.items() if times}
    return Result(figures | {f"{kind}: left": number for kind, number in left.items()}, violations)


def trickle(connections: list[socket.socket]) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.send(b"X: y\r\n")


def is_dropped(kind: str, connection: socket.socket, since: float, dropped: dict[str, list[float]]) -> bool:
    """Whether the maker has closed the connection; what it sends before is read."""
    try:
        while connection.recv(65_536):
            pass
    except BlockingIOError:
        return False
    except OSError:
        pass
    dropped[kind].append(time.monotonic() - since)
    return True


def many_stalled_bodies(scale: float) -> Result:
    """More stalled bodies than the server has threads: pages go on, POSTs are told to come back, and then go on too."""
    count = round(1_100 * min(1, max(scale, 0.6)))
    with tempfile.TemporaryDirectory() as directory, widget_maker(Path(directory)) as (url, _):
        with ExitStack() as stack:
            for _ in range(count):
                stack.enter_context(connect(url)).sendall(STALLS["half a body"])
            statuses = [requests.post(f"{url}/widgets", json={"widget_id": ID}, timeout=20) for _ in range(5)]
            pages = [requests.get(f"{url}{path}", timeout=20).status_code for path in ("/", "/healthz", "/widgets")]
        wait_until(lambda: requests.post(f"{url}/widgets", json={"widget_id": ID}, timeout=20).ok)
    violations = []
    if {(found.status_code, found.headers.get("Retry-After")) for found in statuses} != {(503, "1")}:
        violations.append(f"POSTs among {count} stalled ones: {[found.status_code for found in statuses]}")
    if set(pages) != {200}:
        violations.append(f"pages among {count} stalled bodies: {pages}")
    return Result({"n": count}, violations)


# Malformed requests

CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
MALFORMED: dict[str, tuple[bytes, set[int]]] = {
    "body shorter than its length": (POST + b"Content-Length: 999\r\n\r\n" + BODY, {400}),
    "huge chunk size, half a body": (CHUNKED + b"ffffffffffffffff\r\n" + BODY[:-1], {400}),
    # granian takes the end of the connection for the end of the chunks. JSON that is cut is no JSON, so this is whole.
    "huge chunk size, whole body": (CHUNKED + b"ffffffffffffffff\r\n" + BODY, {200, 201, 400}),
    "negative chunk size": (CHUNKED + b"-1\r\n" + BODY, {400}),
    "0x chunk size": (CHUNKED + b"0x35\r\n" + BODY + b"\r\n0\r\n\r\n", {400}),
    "chunk longer than it says": (CHUNKED + b"5\r\nabcdefgh", {400}),
    "large chunks": (CHUNKED + (b"8000\r\n" + b" " * 0x8000 + b"\r\n") * 4 + b"0\r\n\r\n", {413}),
    "huge length": (POST + b"Content-Length: 99999999999\r\n\r\n" + BODY, {413}),
    "two lengths": (POST + b"Content-Length: 5\r\nContent-Length: 53\r\n\r\n" + BODY, {400}),
    "negative length": (POST + b"Content-Length: -5\r\n\r\n" + BODY, {400}),
    "length no number": (POST + b"Content-Length: abc\r\n\r\n" + BODY, {400}),
    "101 headers": (GET + b"".join(b"X-%d: y\r\n" % number for number in range(100)) + b"\r\n", {431}),
    "2,000 headers": (GET + b"".join(b"X-%d: y\r\n" % number for number in range(2_000)) + b"\r\n", {431}),
    "a header of 1 MB": (GET + b"X: " + b"y" * 1_000_000 + b"\r\n\r\n", {431}),
    "a header name of 100 KB": (GET + b"x" * 100_000 + b": y\r\n\r\n", {431}),
    "folded header": (GET + b"X: a\r\n b\r\n\r\n", {400}),
    "NUL in a header": (GET + b"X: a\0b\r\n\r\n", {400}),
    "a target of 100 KB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", {414, 431}),
    "bytes in the target": (b"GET /\xff\xfe HTTP/1.1\r\n" + HOST + b"\r\n", {400}),
    "escapes in the target": (b"GET /widgets/%ff%00%0d%0a HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    "path upwards": (b"GET /static/../../widget_maker.py HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    "path upwards, escaped": (b"GET /static/%2e%2e/widget_maker.py HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500), {400}),
    "all bytes": (bytes(range(256)) * 4, {400}),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", {400}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {0}),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", {421}),
    "two hosts": (GET + b"Host: evil.example\r\n\r\n", {400, 421}),
    "another host": (b"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", {421}),
    "CONNECT": (b"CONNECT evil.example:80 HTTP/1.1\r\n" + HOST + b"\r\n", {404, 405}),
    "OPTIONS *": (b"OPTIONS * HTTP/1.1\r\n" + HOST + b"\r\n", {404, 405}),
    "unknown method": (b"BREW /widgets HTTP/1.1\r\n" + HOST + b"\r\n", {405}),
    "gzip": (POST + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n\x1f\x8b", {415}),
    "second of two is nonsense": (GET + b"\r\nNONSENSE\0\r\n\r\n", {200}),
}


CUT = {"body shorter than its length", "huge chunk size, whole body", "huge chunk size, half a body"}
TWO = {"second of two is nonsense"}


def malformed_requests(scale: float) -> Result:
    """Bytes that are no request, or one that must be refused: answered as such or closed, and nothing is made."""
    times = max(1, round(20 * scale))
    seen: Counter[int] = Counter()
    violations = []
    with tempfile.TemporaryDirectory() as directory, widget_maker(Path(directory)) as (url, maker):
        for name, (data, expected) in MALFORMED.items():
            for _ in range(times):
                answer = talk(url, data, answers=1 + (name in TWO), cut=name in CUT)
                status = int(answer[9:12]) if answer.startswith(b"HTTP/") else 0
                seen[status] += 1
                if status not in expected:
                    violations.append(f"{name}: answered {status}, not {expected}: {answer[:80]!r}")
                if name in TWO and b"HTTP/1.1 400" not in answer:
                    violations.append(f"{name}: {answer!r}")
        for number in range(10 * times):
            with connect(url) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                connection.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY[: 5 + 5 * (number % 11)])
        if widgets(url) not in ([], [ID]) or not is_healthy(url):
            violations.append(f"afterwards: {widgets(url)}")
        if "Traceback" in maker.err or "panicked" in maker.err:
            violations.append(maker.err[-2_000:])
    figures: dict[str, int | float | str] = {"n": (len(MALFORMED) + 10) * times}
    return Result(figures | {f"HTTP {status}" if status else "closed": n for status, n in seen.items()}, violations)


def talk(url: str, data: bytes, *, answers: int = 1, cut: bool = False) -> bytes:
    """Send it, and read so many answers, or to the end. cut: say that no more comes."""
    answer = b""
    with connect(url) as connection, suppress(ConnectionError):
        with suppress(OSError):  # it may have answered and closed already
            connection.sendall(data)
            if cut:
                connection.shutdown(socket.SHUT_WR)
        while count_answers(answer) < answers and (part := connection.recv(65_536)):
            answer += part
    return answer


def count_answers(data: bytes) -> int:
    """How many whole answers these bytes are."""
    count = 0
    while match := re.match(rb"HTTP/1.*?\r\n\r\n", data, re.DOTALL):
        length = re.search(rb"content-length: (\d+)", match[0])
        size = match.end() + int(length[1] if length else 0)
        if len(data) < size:
            break
        data, count = data[size:], count + 1
    return count


# Script in the page, with a real browser

SCRIPT = "alert(document.domain)"
CORPUS = [
    f"<script>{SCRIPT}</script>",
    f"</title><script>{SCRIPT}</script>",
    f'"><script>{SCRIPT}</script>',
    f"'><script>{SCRIPT}</script>",
    f"</script><script>{SCRIPT}</script>",
    f"--><script>{SCRIPT}</script><!--",
    f"]]><script>{SCRIPT}</script>",
    f"</style><script>{SCRIPT}</script>",
    f"</textarea><script>{SCRIPT}</script>",
    f"<ScRiPt>{SCRIPT}</sCrIpT>",
    f"<script >{SCRIPT}</script >",
    f"<scr<script>ipt>{SCRIPT}</scr</script>ipt>",
    f"<script\x0b>{SCRIPT}</script>",
    f"<img src=x onerror={SCRIPT}>",
    f'"><img src=x onerror="{SCRIPT}">',
    f"'><img src=x onerror='{SCRIPT}'>",
    f"<img src=x:x onerror=`{SCRIPT}`>",
    f"<img/src/onerror={SCRIPT}>",
    f"<IMG SRC=/ ONERROR={SCRIPT}></img>",
    f"<svg onload={SCRIPT}>",
    f"<svg><script>{SCRIPT}</script></svg>",
    f"<svg><animate onbegin={SCRIPT} attributeName=x dur=1s>",
    f"<math><mtext><script>{SCRIPT}</script></mtext></math>",
    f"<body onload={SCRIPT}>",
    f"<details open ontoggle={SCRIPT}>",
    f"<input autofocus onfocus={SCRIPT}>",
    f"<select autofocus onfocus={SCRIPT}>",
    f"<video><source onerror={SCRIPT}></video>",
    f"<audio src=x onerror={SCRIPT}>",
    f"<marquee onstart={SCRIPT}>",
    f"<iframe src=javascript:{SCRIPT}>",
    f'<iframe srcdoc="<script>{SCRIPT}</script>">',
    f"<object data=javascript:{SCRIPT}>",
    f"<embed src=javascript:{SCRIPT}>",
    f"<a href=javascript:{SCRIPT} autofocus>x</a>",
    f"<form action=javascript:{SCRIPT}><button>x</button></form>",
    "<base href=http://127.0.0.1:1/>",
    "<link rel=stylesheet href=http://127.0.0.1:1/x.css>",
    "<style>@import 'http://127.0.0.1:1/x.css';</style>",
    "<meta http-equiv=refresh content='0;url=http://127.0.0.1:1/'>",
    f"<meta http-equiv=refresh content='0;url=javascript:{SCRIPT}'>",
    "<script src=http://127.0.0.1:1/x.js></script>",
    "<script type=module src=data:text/javascript,alert(1)></script>",
    "<img src=http://127.0.0.1:1/x>",
    "<div style=\"background:url('http://127.0.0.1:1/x')\">",
    f'" autofocus onfocus={SCRIPT} x="',
    f"' autofocus onfocus={SCRIPT} x='",
    f'" onmouseover={SCRIPT} style="position:fixed;inset:0" x="',
    f"javascript:{SCRIPT}",
    f"data:text/html,<script>{SCRIPT}</script>",
    "{{7*7}}{{config}}{% import os %}",
    "${7*7}#{7*7}<%= 7*7 %>",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;alert(1)&#60;/script&#62;",
    "%3Cscript%3Ealert(1)%3C/script%3E",
    "\\u003cscript\\u003ealert(1)\\u003c/script\\u003e",
    "\uff1cscript\uff1ealert(1)\uff1c/script\uff1e",
    "+ADw-script+AD4-alert(1)+ADw-/script+AD4-",
    "<script>alert(1)</script>\u2028\u202e\x1b[2J\r\n\r\n<script>alert(1)</script>",
    f"<template><script>{SCRIPT}</script></template><noscript><p title='</noscript><img src=x onerror={SCRIPT}>'>",
    f"<xmp><img title='</xmp><img src=x onerror={SCRIPT}>'>",
]
PARAMETERS = ("after", "limit", "q", "search", "id", "outcome", "widget_id")
"""Of the page, and such as it may have one day."""


def browser_path() -> tuple[str, str] | None:
    """Chromium and its driver, as Debian's chromium and chromium-driver bring them; None where one is missing."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    return (chromium, driver) if chromium and driver else None


class Browser:
    """Chromium without a window, driven by the WebDriver protocol."""

    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> Self:
        options = {"args": ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "unhandledPromptBehavior": "ignore"}
        found = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._url += f"/session/{found['sessionId']}"
        return self

    def __exit__(self, *_: object) -> None:
        self._ask("DELETE", "")

    def open(self, url: str) -> list[str]:
        """Go there; the texts of the dialogs that it opens."""
        self._ask("POST", "/url", {"url": url})
        dialogs = []
        while (text := self._ask("GET", "/alert/text")) is not None:
            dialogs.append(str(text))
            self._ask("POST", "/alert/dismiss", {})
        return dialogs

    def _ask(self, method: str, path: str, content: Any = None) -> Any:
        answer = requests.request(method, self._url + path, json=content, timeout=60)
        value = answer.json()["value"]
        error = value.get("error") if isinstance(value, dict) else None
        if error in {"no such alert", "unexpected alert open"}:
            return None
        assert error is None, value
        return value


@contextmanager
def browser() -> Iterator[Browser]:
    found = browser_path()
    assert found, "Chromium is missing: apt-get install chromium chromium-driver"
    port = free_port()
    with subprocess.Popen([found[1], f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as driver:
        try:
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: driver_answers(url))
            with Browser(url) as running:
                yield running
        finally:
            driver.terminate()


def driver_answers(url: str) -> bool:
    with suppress(requests.RequestException):
        return bool(requests.get(f"{url}/status", timeout=5).json()["value"]["ready"])
    return False


class ReportingProxy(FaultProxy):
    """In front of the maker: asks browsers to report what its Content-Security-Policy stops. reports: what came."""

    def __init__(self, target: str) -> None:
        super().__init__(target)
        self.reports: list[str] = []
        self.answer = self.report
        self.spoil: Callable[[Reply], Reply] = lambda reply: reply

    def report(self, request: Request) -> Reply | Raw:
        if request.path == "/csp-report":
            self.reports.append(request.body.decode(errors="replace"))
            return Reply(204)
        if request.path == "/favicon.ico":
            return Reply(404)
        reply = self.spoil(self.forward(request))
        policy = str(reply.headers.get("Content-Security-Policy", ""))
        return Reply(
            reply.status,
            reply.body,
            dict(reply.headers) | ({"Content-Security-Policy": f"{policy}; report-uri /csp-report"} if policy else {}),
        )


def script_in_the_page(scale: float) -> Result:
    """Script as ids, keys, headers and query parameters, in Chromium: no dialog, and nothing for CSP to stop."""
    corpus = CORPUS[:: max(1, round(1 / max(scale, 1e-6)) // 4)]
    violations: list[str] = []
    pages = posts = 0
    with (
        tempfile.TemporaryDirectory() as directory,
        widget_maker(Path(directory), "--fail-rate", 1, "--fault-id", CORPUS[0], "--fault-id", ID) as (url, maker),
        ReportingProxy(url) as proxy,
        browser() as chromium,
    ):
        violations += control(proxy, chromium)
        requests.post(f"{url}/widgets", json={"widget_id": ID}, timeout=10)

        def look(path: str, payload: str) -> None:
            nonlocal pages
            pages += 1
            reports = len(proxy.reports)
            dialogs = chromium.open(proxy.url + path)
            if dialogs or len(proxy.reports) > reports:
                violations.append(f"{path}: {payload!r}: dialogs {dialogs}, reports {proxy.reports[reports:][:1]}")

        for payload in corpus:
            posts += send_everywhere(url, payload)
            look("/", payload)
            escaped = quote(payload, safe="")
            for parameter in PARAMETERS:
                look(f"/?{parameter}={escaped}", payload)
            for path in (f"/widgets/{escaped}", f"/{escaped}", f"/widgets?after={escaped}", "/metrics"):
                look(path, payload)
        if "Traceback" in maker.err:
            violations.append(maker.err[-2_000:])
    return Result({"n": pages, "payloads": len(corpus), "posts": posts}, violations)


def send_everywhere(url: str, payload: str) -> int:
    """Send it as everything that a client decides."""
    printable = payload.encode("ascii", "replace").decode().translate(dict.fromkeys(range(32), "?"))
    headers = {"Idempotency-Key": printable, "webhook-id": printable, "User-Agent": printable, "Referer": printable}
    headers |= {"X-Message-Queue": printable, "X-Message-Age": printable, "X-Forwarded-For": printable}
    bodies: list[Any] = [{"widget_id": payload}, {"widget_id": ID, payload: payload}, {payload: ID}, [payload], payload]
    for body in bodies:
        requests.post(f"{url}/widgets", json=body, headers=headers, timeout=10)
    item = {"message_id": payload, "request": {"widget_id": payload}}
    requests.post(f"{url}/widgets/batch", json=[item, {"message_id": "m", "request": payload}], timeout=10)
    requests.post(f"{url}/widgets", data=payload.encode(), headers={"Content-Type": "application/json"}, timeout=10)
    requests.get(f"{url}/", headers={"Host": printable}, timeout=10)
    return len(bodies) + 3


def control(proxy: ReportingProxy, chromium: Browser) -> list[str]:
    """That dialogs and reports are seen where there are some: the same page with script in it, without and with CSP."""
    html = {"Content-Type": "text/html"}
    page = f"<p>x</p><script>{SCRIPT}</script>"
    proxy.spoil = lambda reply: Reply(200, page, html)
    dialogs = chromium.open(f"{proxy.url}/")
    policy = {"Content-Security-Policy": "default-src 'none'"}
    proxy.spoil = lambda reply: Reply(200, page, html | policy)
    blocked = chromium.open(f"{proxy.url}/")
    with suppress(AssertionError):
        wait_until(lambda: proxy.reports, 10)
    reports = len(proxy.reports)
    proxy.spoil = lambda reply: reply
    if len(dialogs) != 1 or blocked or reports != 1:
        return [f"the browser does not show what it should: {dialogs}, {blocked}, {reports} reports"]
    assert json.loads(proxy.reports[0])
    return []


CAMPAIGNS = [
    Campaign("stalled-clients", "300 stalled connections delay /healthz by less than 500 ms", stalled_clients),
    Campaign(
        "stalled-bodies",
        "1,100 stalled bodies leave the pages as they are, and end no POST for good",
        many_stalled_bodies,
    ),
    Campaign("malformed-requests", "bytes that are no request make nothing and end nothing", malformed_requests),
    Campaign(
        "page-xss",
        "no script that a client sends runs in the maker's page, or needs CSP to stop it",
        script_in_the_page,
    ),
]
