"""The stage of one run: a fresh directory, a maker, what wrk makes of it just now, and the contestant's service."""

import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request
import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import apsw

from . import environments
from .processes import end, require_free_port, spawn, wait_for_port

MAKER_CORE, CONTESTANT_CORE = "0", "1"
MAKER_PORT = 5092
MAKER_BASE = f"http://127.0.0.1:{MAKER_PORT}"
DIRECTORY = environments.BENCH / "run"
MAKERS = {
    "own": "exec $PYTHON $ROOT/widget_maker.py --port $BENCH_MAKER_PORT --database $BENCH_DIR/widgets.sqlite3"
    " --log-level warning",
    "timed": "exec $PYTHON $PROGRAMS/makers.py timed",
    "waitress": "PYTHONPATH=$PYTHONPATH:$(echo $VENVS/bench-waitress/lib/python*/site-packages)"
    " exec $PYTHON $PROGRAMS/makers.py waitress",
    "answering": "gcc -O2 -D_GNU_SOURCE -o $BENCH_DIR/answering $PROGRAMS/answering.c && exec $BENCH_DIR/answering",
}
"""own: the project's maker. timed: it notes when each answer leaves. waitress: the same app on waitress.

answering: an endpoint that only answers.
"""
WRK_S = 1.0
SETTLE_S = 0.5
PROXY_OFFSET = 1000


class Maker:
    """A running maker; what was made before forget() does not count."""

    def __init__(self, kind: str, env: dict[str, str], core: str | None, log: Any) -> None:
        self.kind = kind
        self._directory = Path(env["BENCH_DIR"])
        require_free_port(MAKER_PORT)
        self.process = spawn(MAKERS[kind], env, core, stdout=log, stderr=log)
        wait_for_port(MAKER_PORT, self.process)
        self._forgotten = 0
        self._answers_before: dict[str, float] = {}
        if kind != "answering":
            database = str(self._directory / "widgets.sqlite3")
            self._database = apsw.Connection(database, flags=apsw.SQLITE_OPEN_READONLY)

    def count(self) -> int:
        """How many widgets there are."""
        if self.kind == "answering":
            return int(_get("/count")) - self._forgotten
        return int(self._database.execute("SELECT coalesce(max(number), 0) FROM widget").get) - self._forgotten

    def made(self) -> dict[str, float]:
        """When each widget was made, in UTC seconds."""
        if self.kind == "answering":
            return dict(list(json.loads(_get("/made")).items())[self._forgotten :])
        if self.kind == "timed":
            lines = (self._directory / "answers").read_text().splitlines()[self._forgotten :]
            return {line.split()[0]: float(line.split()[1]) for line in lines}
        rows = self._database.execute("SELECT id, created_at FROM widget WHERE number > ?", (self._forgotten,))
        return {id_: datetime.fromisoformat(created_at).timestamp() for id_, created_at in rows}

    def answers(self) -> dict[str, float]:
        """Numbers of answers by kind, such as `created`, `repeated` or the code of a rejection."""
        if self.kind == "answering":
            return {"created": self.count()}
        found = re.findall(r'^widget_maker_\w+_total\{\w+="(\w+)"\} (\S+)$', _get("/metrics"), re.MULTILINE)
        now = {name: float(number) for name, number in found}
        return {n: left for n, number in now.items() if (left := number - self._answers_before.get(n, 0))}

    def forget(self) -> None:
        """Begin anew, once what is on its way has been made."""
        before = -1
        while before != (before := self.count()):
            time.sleep(SETTLE_S)
        self._answers_before = {}
        self._answers_before = self.answers()
        self._forgotten += self.count()

    def stop(self) -> None:
        if self.kind != "answering":
            self._database.close()
        end(self.process)


def _get(path: str) -> str:
    with urllib.request.urlopen(MAKER_BASE + path, timeout=10) as response:
        return response.read().decode()


def rate(moments: Collection[float]) -> float:
    """Per second, from the first to the last."""
    return (len(moments) - 1) / (max(moments) - min(moments))


def steady_rate(moments: Collection[float]) -> float:
    """Per second, without the first and the last tenth: there one of two processes still starts, or has ended."""
    tenth = len(moments) // 10
    return rate(sorted(moments)[tenth : len(moments) - tenth])


def wrk(env: dict[str, str], core: str | None, *, seconds: float, connections: int = 8, delay_ms: float = 0) -> Any:
    """What wrk says of the maker: `per_s`, `p50_ms`, `p99_ms`, `errors`. delay_ms: mean pause of a connection."""
    command = (
        f"exec wrk -t1 -c{connections} -d{seconds:g}s -s $PROGRAMS/post.lua {MAKER_BASE}"
        f" -- {time.time_ns() % 2**31} {delay_ms}"
    )
    with spawn(command, env, core, stdout=subprocess.PIPE, text=True) as process:
        output = process.communicate()[0]
    return last_json(output)


@dataclass(frozen=True)
class Stage:
    """What one run works with. wrk_per_s: the widgets a second that wrk had made just before."""

    env: dict[str, str]
    core: str | None
    log: Any
    maker: Maker
    wrk_per_s: float
    service: subprocess.Popen[Any] | None

    def spawn(self, command: str, core: str | None = None) -> subprocess.Popen[Any]:
        """Start a command of the contestant's; core: another than the contestant's own."""
        return spawn(command, self.env, core or self.core, stdout=self.log, stderr=self.log)

    def run(self, command: str) -> Any:
        """Run a command to its end; gives the JSON object that it printed."""
        done = subprocess.run(
            ["bash", "-c", command], env=self.env, check=True, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        return last_json(done.stdout)

    def write_ids(self, count: int) -> list[str]:
        """New widget ids, one a line, for the contestant to load or produce."""
        ids = [str(uuid.uuid1()) for _ in range(count)]
        Path(self.env["BENCH_IDS"]).write_text("\n".join(ids) + "\n")
        return ids

    def service_requests(self) -> int:
        """How many requests the service was sent; only on a stage that counts them."""
        if self.env.get("BENCH_REDIS_URL"):
            command = ["redis-cli", "-u", self.env["BENCH_REDIS_URL"], "info", "stats"]
            found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            return int(re.search(r"total_commands_processed:(\d+)", found)[1])
        return (DIRECTORY / "requests").stat().st_size


@contextlib.contextmanager
def stage(
    *,
    maker: str = "own",
    pinned: bool = True,
    service: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
    counted: bool = False,
) -> Iterator[Stage]:
    """Set up one run. counted: HTTP requests to the service pass a proxy that counts them."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir()
    env = environments.variables() | {
        "BENCH_DIR": str(DIRECTORY),
        "BENCH_IDS": str(DIRECTORY / "ids"),
        "BENCH_PRODUCED": str(DIRECTORY / "produced"),
        "BENCH_MAKER_PORT": str(MAKER_PORT),
        "BENCH_MAKER_URL": f"{MAKER_BASE}/widgets",
        "OURS": f"{environments.PYTHON} {environments.ROOT / 'widget_consumer.py'}",
        "WIDGET_QUEUE_URL": f"sqlite:///{DIRECTORY / 'queues.sqlite3'}",
        "WIDGET_MAKER_URL": f"{MAKER_BASE}/widgets",
        "WIDGET_RECEIVE_COUNTS": str(DIRECTORY / "receive-counts.sqlite3"),
        "WIDGET_CREATE": "1",
        "WIDGET_LOG_LEVEL": "warning",  # the others are silent about single messages too
    }
    env |= (service or {}).get("variables", {}) | (variables or {})
    core = CONTESTANT_CORE if pinned else None
    with (DIRECTORY / "log").open("w") as log, contextlib.ExitStack() as closing:
        running = Maker(maker, env, MAKER_CORE if pinned else None, log)
        closing.callback(running.stop)
        wrk(env, core, seconds=WRK_S)
        wrk_per_s = rate(running.made().values())
        running.forget()
        process = None
        if service:
            port = service["port"]
            counted = counted and "BENCH_REDIS_URL" not in env
            if counted:  # all addresses name the proxy
                env |= {name: value.replace(f":{port}", f":{port + PROXY_OFFSET}") for name, value in env.items()}
                env["BENCH_SERVICE_PORT"] = str(port + PROXY_OFFSET)
            process = spawn(service["start"], env, core, stdout=log, stderr=log)
            closing.callback(end, process)
            wait_for_port(port, process)
            if counted:
                proxy = spawn(f"exec $PYTHON $PROGRAMS/counting_proxy.py {port + PROXY_OFFSET} {port}", env, core)
                closing.callback(end, proxy)
                wait_for_port(port + PROXY_OFFSET, proxy)
            if "setup" in service:
                subprocess.run(["bash", "-c", service["setup"]], env=env, check=True, stdout=log, stderr=log)
        yield Stage(env, core, log, running, wrk_per_s, process)


def last_json(text: str) -> Any:
    """The object that the last line with one holds; empty when there is none."""
    for line in reversed(text.strip().splitlines()):
        with contextlib.suppress(ValueError):
            if isinstance(found := json.loads(line), dict):
                return found
    return {}
