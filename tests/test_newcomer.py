"""A newcomer with README alone: each section's commands are typed as written, into real shells in a clean clone.

A section is read from top to bottom. What stands between two blocks of commands (```sh) is obeyed and believed:

- "terminal N" says into which terminal the next block goes; where nothing does, into that of the block before.
- "prints", "says" or "shows" and a `code span`: what the block before, or after "terminal N" the block that follows,
  brings onto its terminal; … stands for anything.
- <http://127.0.0.1...> is opened, and shows what the last part of its path names.
- "Ctrl-C" is pressed where a block goes into a terminal whose command still runs; nothing may run there otherwise.

docs/operating.md is for those who have done that before: only its commands are run, with files that are there.

The clone takes over this project's virtual environments: installing them anew would take minutes.
"""

import ctypes
import fcntl
import os
import pty
import re
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
from support import HERE, tool_or_skip, wait_until

SECONDS = 40.0
"""For one thing to happen: a dead letter takes five attempts with pauses between."""
ENDING_S = 1.0
"""For a command that has said all it was to say, and ends by itself."""
LISTENS = {"make zaqar": 8888, "make sqs": 9324}
"""Where these do some seconds after they have told the settings, as README says."""
PORTS = (5000, *LISTENS.values())
EXIT_CODES = {
    ".venv/bin/python widget_producer.py --widget-id=this_is_not_a_valid_widget_id --wait": 1,
    ".venv/bin/python widget_producer.py --widget-id=d34dd34d-54f4-11e5-ad75-3c970e65f731 --wait": 1,
}
CLONE_NEWNET, SIOCSIFFLAGS, IFF_UP_AND_RUNNING = 0x40000000, 0x8914, 0x41  # Linux's
MAKE_STOPPED = 130
"""What make gives when Ctrl-C ends what it runs, however that ends."""
UNTESTED = {
    "python3 -m venv .venv": "would take the place of the environment that is shared with the clone",
    ".venv/bin/pip install -r requirements.txt": "minutes, a compiler and the network",
    "sudo systemctl daemon-reload": "needs systemd and root",
    "sudo systemctl enable --now widget-maker widget-consumer": "needs systemd and root",
    "podman build -f deploy/Containerfile -t widgets .": "needs podman and the network",
}
CLAIM = re.compile(r"\b(?:prints|says|shows)\b[^`.]*`([^`]+)`")
LINK = re.compile(r"<(http://127\.0\.0\.1[^>]*)>")
TERMINAL = re.compile(r"\bterminal (\d)", re.I)
PROMPT = re.compile(r"<<(\d+)>>\Z")
LOCKS = ("pyproject.toml", "requirements.lock", "tests/requirements.lock", *(f"tests/servers/{n}.lock" for n in
         ("zaqar18", "zaqar23", "sqs", "fuzz")))  # fmt: skip


@dataclass
class Step:
    """A block of commands, and what is said right before and after it."""

    commands: list[str]
    terminal: int
    ctrl_c: bool
    claims: list[str]
    links: list[str]


def sections(page: str) -> dict[str, str]:
    """The text of each `##` section with commands, by its heading; what comes before the first one is `start`."""
    text = (HERE / page).read_text()
    parts = re.split(r"^## (.*)$", f"## start\n{text}", flags=re.M)
    return {title: body for title, body in zip(parts[1::2], parts[2::2], strict=True) if "```sh\n" in body}


PAGES = [(page, title) for page in ("README.md", "docs/operating.md") for title in sections(page)]


def steps(text: str) -> list[Step]:
    """The blocks of a section in order."""
    found: list[Step] = []
    prose, *rest = re.split(r"^```", text, flags=re.M)
    for fence, after in zip(rest[::2], rest[1::2], strict=True):
        kind, _, body = fence.partition("\n")
        if kind != "sh":
            prose += after
            continue
        before, mention, here = _split(prose)
        if found:
            found[-1].claims += CLAIM.findall(before)
            found[-1].links += LINK.findall(before)
        terminal = int(mention) if mention else found[-1].terminal if found else 1
        claims = CLAIM.findall(here) if mention else []
        found.append(Step(body.splitlines(), terminal, "Ctrl-C" in prose, claims, []))
        prose = after
    found[-1].claims += CLAIM.findall(prose)
    found[-1].links += LINK.findall(prose)
    return found


def _split(prose: str) -> tuple[str, str, str]:
    """What is said before the last mention of a terminal, its number, and what comes after."""
    mentions = list(TERMINAL.finditer(prose))
    if not mentions:
        return prose, "", ""
    last = mentions[-1]
    return prose[: last.start()], last[1], prose[last.end() :]


class Terminal:
    """An interactive shell. shown: all that it and its commands wrote."""

    def __init__(self, directory: Path) -> None:
        self._side, self._other = pty.openpty()  # the other stays open, or there is nothing to read for a moment
        fcntl.ioctl(self._other, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))
        name = os.ttyname(self._other)
        # The first terminal that a session's leader opens is its own: where Ctrl-C comes from.
        enter = f"export TERM=dumb PS1='<<$?>>' PS2=; exec bash --norc --noprofile --noediting -i <>{name} >&0 2>&1"
        env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self._process = subprocess.Popen(["bash", "-c", enter], cwd=directory, env=env, start_new_session=True)
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.command = ""
        self._begun = 0
        self.was_stopped = False

    def begin(self) -> None:
        self.wait_for_end()  # what is typed before the first prompt may be dropped
        self.type("stty -echo")
        self.wait_for_end()

    @property
    def shown(self) -> str:
        return self._written.decode(errors="replace").replace("\r\n", "\n")

    @property
    def is_busy(self) -> bool:
        return not PROMPT.search(self.shown, self._begun)

    def since(self) -> int:
        return len(self.shown)

    def type(self, command: str) -> None:
        self.command, self._begun, self.was_stopped = command, len(self.shown), False
        os.write(self._side, f"{command}\n".encode())

    def press_ctrl_c(self) -> None:
        self.was_stopped = True
        os.write(self._side, b"\x03")

    def wait_for_end(self) -> int:
        """The exit code of the last command."""
        self._wait(lambda: not self.is_busy, f"still running: {self.command}")
        ended = PROMPT.search(self.shown, self._begun)
        assert ended
        return int(ended[1])

    def wait_for(self, claim: str, begun: int) -> None:
        """Wait until the terminal shows what is claimed; no longer than the command runs."""
        words = [re.escape(word) for word in claim.split()]
        pattern = re.compile(r"\s+".join(words).replace("…", ".*"))
        self._wait(lambda: pattern.search(self.shown, begun) or not self.is_busy, f"not seen: {claim}")
        assert pattern.search(self.shown, begun), f"not seen: {claim}\n{self.shown}"

    def end(self) -> None:
        """Hang up: the shell passes it on to what it runs."""
        self._process.send_signal(signal.SIGHUP)
        self._process.wait(SECONDS)
        os.close(self._other)
        self._reader.join(SECONDS)  # until all that had the terminal open has ended
        os.close(self._side)

    def _wait(self, condition: Callable[[], object], otherwise: str) -> None:
        try:
            wait_until(condition, SECONDS)
        except AssertionError:
            raise AssertionError(f"{otherwise}\n{self.shown[-4000:]}") from None

    def _read(self) -> None:
        with suppress(OSError):  # either side is closed
            while found := os.read(self._side, 65_536):
                self._written += found


class Newcomer:
    """Follows a section, with as many terminals as it asks for."""

    def __init__(self, clone: Path) -> None:
        self._clone = clone
        self._terminals: dict[int, Terminal] = {}

    def follow(self, step: Step) -> None:
        if step.terminal not in self._terminals:
            self._terminals[step.terminal] = Terminal(self._clone)
            self._terminals[step.terminal].begin()
        terminal = self._terminals[step.terminal]
        if step.ctrl_c and terminal.is_busy:
            terminal.press_ctrl_c()
        terminal.wait_for_end()
        begun = terminal.since()
        for command in step.commands:
            self._expect_exit_code(terminal)
            terminal.type(command)
        for claim in step.claims:
            terminal.wait_for(claim, begun)
        if not step.claims:
            terminal.wait_for_end()
        if port := LISTENS.get(step.commands[-1]):
            wait_until(lambda: _is_open(port), SECONDS)
        for link in step.links:
            page = wait_until(lambda link=link: self._open(link), SECONDS)
            assert link.rpartition("/")[2] in page

    def leave(self) -> None:
        """Stop what still runs, as README says, with Ctrl-C."""
        for terminal in self._terminals.values():
            with suppress(AssertionError):
                wait_until(lambda terminal=terminal: not terminal.is_busy, ENDING_S)
            if terminal.is_busy:
                terminal.press_ctrl_c()
            self._expect_exit_code(terminal)

    def close(self) -> None:
        for terminal in self._terminals.values():
            terminal.end()

    def _expect_exit_code(self, terminal: Terminal) -> None:
        code, command = terminal.wait_for_end(), terminal.command
        if command.startswith("make ") and terminal.was_stopped:
            assert code == MAKE_STOPPED
            return
        assert code == EXIT_CODES.get(command, 0), f"{command}: exit code {code}\n{terminal.shown[-4000:]}"

    @staticmethod
    def _open(link: str) -> str:
        with suppress(requests.RequestException):
            answer = requests.get(link, timeout=5)
            if answer.ok:
                return answer.text
        return ""


def _is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def own_network() -> Iterator[None]:
    """A loopback of its own for this thread and what it starts, so that fixed ports are free; else the machine's."""
    namespace = Path("/proc/thread-self/ns/net")
    libc = ctypes.CDLL(None, use_errno=True)
    with ExitStack() as stack:
        usual = stack.enter_context(namespace.open()) if namespace.exists() else None
        if usual is None or libc.unshare(CLONE_NEWNET) != 0:  # that is root's alone
            for port in PORTS:
                if _is_open(port):
                    pytest.skip(f"port {port} is in use, and this user may not have a network of its own")
            yield
            return
        try:
            with socket.socket() as any_socket:
                fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", IFF_UP_AND_RUNNING))
            yield
        finally:
            assert libc.setns(usual.fileno(), CLONE_NEWNET) == 0


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean clone of this project as it is now, committed or not."""
    for needed in (".venv/installed", ".venvs/zaqar23/installed", ".venvs/sqs/installed"):
        if not (HERE / needed).exists():
            pytest.skip(f"needs {needed} (make setup servers)")
    directory = tmp_path_factory.mktemp("newcomer")
    origin, here = directory / "origin", directory / "itchy-octo-chainsaw"
    git = [
        tool_or_skip("git", package="git"),
        "-c",
        "commit.gpgsign=false",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@localhost",
    ]
    subprocess.run([*git, "init", "-q", "--bare", origin], check=True)
    there = [*git, f"--git-dir={origin}", f"--work-tree={HERE}"]
    subprocess.run([*there, "add", "-A"], cwd=HERE, check=True)
    # Where these are links they are not ignored.
    subprocess.run([*there, "rm", "-rq", "--cached", "--ignore-unmatch", ".venv", ".venvs"], cwd=HERE, check=True)
    subprocess.run([*there, "commit", "-qm", "as it is"], cwd=HERE, check=True)
    subprocess.run([*git, "clone", "-q", origin, here], check=True)
    for name in (".venv", ".venvs"):
        (here / name).symlink_to(HERE / name)
    for name in LOCKS:  # older than what was installed from them
        os.utime(here / name, (0, 0))
    return here


@pytest.mark.xdist_group("newcomer")
@pytest.mark.parametrize(("page", "title"), PAGES)
def test_a_newcomer_can_follow(page: str, title: str, clone: Path) -> None:
    tool_or_skip("bash", package="bash")
    tool_or_skip("make", package="make")
    with own_network(), ExitStack() as stack:
        if page != "README.md":
            subprocess.run([".venv/bin/python", "-m", "claim_queues", "stats"], cwd=clone, check=True)
        newcomer = Newcomer(clone)
        stack.callback(newcomer.close)
        for step in steps(sections(page)[title]):
            step.commands = [command for command in step.commands if command not in UNTESTED]
            if page != "README.md":
                step.claims, step.links = [], []
            if step.commands:
                newcomer.follow(step)
        newcomer.leave()


def test_commands_stand_in_sh_blocks_alone() -> None:
    for page in ("README.md", "docs/operating.md"):
        fences = re.findall(r"^```(.*)$", (HERE / page).read_text(), re.M)
        assert set(fences[::2]) <= {"sh", ""}


def test_what_is_not_tested_is_there() -> None:
    text = "\n".join(sections(page)[title] for page, title in PAGES)
    assert [command for command in UNTESTED if f"\n{command}\n" not in text] == []
