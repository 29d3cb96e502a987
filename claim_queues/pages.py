"""How web pages are served: in one style, out of reach of other web sites, until a block ends."""

import logging
import os
import re
import socket
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime

import waitress
from flask import Blueprint, Flask, Response, request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from werkzeug.exceptions import HTTPException, NotFound

from .cli import one_line

ADDRESS = re.compile(r"(localhost|[0-9.]+|\[[0-9a-f:.]+\])?")
"""Host headers that other web sites cannot cause: for them a browser would send their own names."""
MOST_BODY_BYTES = 5_242_880  # larger bodies are cut off; the application answers all others
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
}


class Refused(HTTPException):
    """The request is answered with this status, this message and, where the answer is JSON, this error code."""

    def __init__(self, status: int, error_code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.error_code = status, error_code


class App(Flask):
    """Pages of a package. Templates and static files that it lacks are taken from this package."""

    def __init__(self, package: str) -> None:
        super().__init__(package)
        self._shared = Blueprint("shared", __package__, static_folder="static", template_folder="templates")
        self.register_blueprint(self._shared)

    def send_static_file(self, filename: str) -> Response:
        try:
            return super().send_static_file(filename)
        except NotFound:
            return self._shared.send_static_file(filename)


def create_app(
    package: str, names: Collection[str] | None, headers: Mapping[str, str] = {}, *, hint: str = "see --allowed-host"
) -> Flask:
    """An application of that package that answers to IP addresses and these names, in lower case (None: to all).

    Else other web sites could read it through a browser, by a name that leads here. hint: what a refusal advises.
    """
    app = App(package)
    app.jinja_env.filters |= {"line": one_line, "clock": as_clock}

    @app.before_request
    def check_host() -> None:
        host = re.sub(":[0-9]+$", "", request.headers.get("Host", "").lower())
        is_ours = names is None or host in names or ADDRESS.fullmatch(host)
        if not is_ours and request.path != "/healthz":  # which a probe may ask under any name
            raise Refused(421, "host_not_allowed", f"{one_line(host, 80)!r} is not a name of this server: {hint}")

    @app.after_request
    def add_headers(response: Response) -> Response:
        response.headers.update({**HEADERS, **headers})
        return response

    return app


def as_clock(seconds: float) -> str:
    """A moment in UTC seconds as people read it."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def serve_metrics(app: Flask, registry: CollectorRegistry) -> None:
    """Serve these metrics at /metrics, in the format of Prometheus."""
    metrics = {"Content-Type": CONTENT_TYPE_LATEST}
    app.add_url_rule("/metrics", "metrics", lambda: (generate_latest(registry), metrics))


@contextmanager
def serving(app: Flask, host: str, port: int, threads: int = 8) -> Iterator[None]:
    """Serve until the block ends; requests in progress then get one second. Raises OSError where it cannot listen."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        reason = os.strerror(number) if number > 0 else getattr(error, "strerror", None) or error
        raise OSError(f"cannot listen at {host} port {port}: {reason}: give another address or port") from error
    logging.getLogger("waitress").setLevel(logging.CRITICAL)  # it reports each client that goes away
    limits = {"threads": threads, "connection_limit": 500, "max_request_body_size": MOST_BODY_BYTES}
    server = waitress.create_server(app, sockets=[listener], asyncore_use_poll=True, ident=None, **limits)
    threading.Thread(target=server.run, name="server", daemon=True).start()
    try:
        yield
    finally:
        server.task_dispatcher.shutdown(timeout=1)
        server.close()
