"""Power cuts, I/O errors, full and read-only disks, damaged and foreign files."""

import errno
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from support import tool_or_skip, wait_until

from .frame import Result, campaign, scaled, together
from .world import World, expect, widget_ids, world

CUTS_PER_FILE = 10
PAGE = 4096
STORE, PARTLY = 5, 6
"""Exit codes."""


@cache
def shim() -> str:
    """disk.c, compiled."""
    path = Path(tempfile.mkdtemp()) / "disk.so"
    gcc, source = tool_or_skip("gcc", package="gcc"), Path(__file__).with_name("disk.c")
    subprocess.run([gcc, "-O1", "-shared", "-fPIC", "-o", path, source, "-ldl"], check=True)
    return str(path)


@campaign("a power cut at a random time: nothing reported is lost, no file is damaged", times=30, lanes=2)
def powercuts(scale: float) -> Result:
    """The power goes while all work; then each file is as at its last sync, or a mix of that and what followed."""
    cuts, broken = min(CUTS_PER_FILE, scaled(300, scale)), list[str]()
    env = {"LD_PRELOAD": shim()}
    with world() as made:
        synced = made.directory / ".synced"
        for _ in range(cuts):
            synced.mkdir()
            for path in made.directory.glob("*.sqlite3*"):
                shutil.copy(path, synced)
            with made.maker(env=env):
                runs = [made.consumer(*options, env=env) for options in ((), ("--post-batch", 20))]
                batch = {"POST_LIMIT": str(random.choice((1, 10, 100)))}
                producers = [made.producer(widget_ids(600), env=env | batch) for _ in range(2)]
                wait_until(lambda some=producers: any(run.out for run in some))
                time.sleep(random.uniform(0, 0.6))
                for run in (*runs, *producers):
                    run.kill()
            before = len(made.posted)
            made.read_producers()
            broken += [] if len(made.posted) > before else ["nothing was reported before the cut"]
            _go_back(made, synced, mix=random.random() < 0.5)
            broken += made.check(is_drained=False).broken
            shutil.rmtree(synced)
        with made.maker():
            made.drain("--post-batch", 20)
        return made.check().plus(*broken, cuts=cuts)


def _go_back(made: World, synced: Path, *, mix: bool) -> None:
    """Leave what the disk holds after the cut. mix: page by page, what was not synced may have reached it too."""
    for path in {*made.directory.glob("*.sqlite3*"), *(made.directory / kept.name for kept in synced.glob("[!.]*"))}:
        kept = synced / path.name
        old = kept.read_bytes() if kept.exists() else b""
        if mix and path.exists():
            old = _mix(old, path.read_bytes())
        path.unlink(missing_ok=True)
        if (old or kept.exists()) and not path.name.endswith("-shm"):
            path.write_bytes(old)


def _mix(old: bytes, new: bytes) -> bytes:
    if len(new) < len(old):  # another file of that name: of a file only its own content can be mixed
        return random.choice((old, new))
    pages = (random.choice((old, new))[start : start + PAGE] for start in range(0, len(new), PAGE))
    return b"".join(page.ljust(PAGE, b"\0") for page in pages)[: random.choice((len(old), len(new)))]


ONE_ERROR = {"FAIL_ERROR": str(errno.EIO)}
FAILURES = [ONE_ERROR, ONE_ERROR | {"FAIL_ON": "1"}, {"FAIL_ERROR": str(errno.ENOSPC), "FAIL_ON": "1"}]


@campaign(
    "an I/O error or a full disk at each call that writes: nothing lost",
    [(role, env) for role in ("consumer", "producer", "maker") for env in FAILURES],
    lanes=3,
)
def ioerrors(scale: float, role: str, env: dict[str, str]) -> Result:
    """Once or from then on: the first call of a process, the second one, and so on until it makes no more."""
    step, found = min(40, round(1 / scale)), list[Result]()
    for number in count(random.randint(1, step), step):
        with world() as made:
            where = {"LD_PRELOAD": shim(), "FAIL_IN": str(made.directory), "FAIL_AT": str(number)}
            code = _fail(made, role, env | where)
            if not (made.directory / ".failed").exists():
                break
            figures, broken = made.check(is_drained=role != "producer")
        if code not in (0, STORE, *([PARTLY] if role == "producer" else [])):
            broken.append(f"exit code {code}")
        broken = [f"{role}, call {number}, {env}: {line}" for line in broken]
        found.append(Result(figures | {"calls": 1, f"{role}s that exit {code}": 1}, broken))
    return together(lambda each: each, found)


def _fail(made: World, role: str, env: dict[str, str]) -> int:
    """Run the script with the fault, and its peers without; gives its exit code."""
    if role == "producer":
        return made.producer(widget_ids(4), env=env | {"POST_LIMIT": "2"}).exit_code()
    made.post_ids(4)
    if role == "consumer":
        with made.scripted():
            code = made.consumer("--slots", 1, "--drain", env=env).exit_code()
            made.drain()
        return code
    with made.maker(env=env) as maker:
        consumer = made.consumer("--slots", 1)
        wait_until(lambda: maker.process.poll() is not None or not made.stats().free)
        time.sleep(0.2)
        maker.signal(signal.SIGTERM)
        code = maker.exit_code()
        consumer.kill()
    with made.maker():
        made.drain()
    return code


@campaign("full and read-only disks; damaged and foreign files: exit 5, left as they are")
def disk(scale: float) -> Result:
    """Disks that fill up under queue and maker, at many sizes, a read-only one, and files that are not ours."""
    damages = [*DAMAGES.items()][:: min(5, round(1 / scale))]
    cases: list[tuple[Any, ...]] = [(_damaged, *damage) for damage in damages]
    if os.geteuid() == 0:
        cases += [(_fill, kilobytes) for kilobytes in range(128, 1_024, 64)[:: round(1 / scale)]]
        cases += [(_fill_maker,), (_read_only,)]
    tried = len(cases) - len(damages)
    found = together(lambda case: case[0](*case[1:]), cases, lanes=2)
    return found.plus("" if tried else "no disk was tried: only root may mount one", disks_tried=tried)


@contextmanager
def _disk(made: World, kilobytes: int) -> Iterator[Path]:
    where = made.directory / "disk"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def _remount(where: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", where], check=True)


def _fill(kilobytes: int) -> Result:
    """The queue's disk fills up under a producer, then under a consumer; then there is room."""
    with world() as made, _disk(made, kilobytes) as disk, made.maker():
        made.queue = disk / "q.sqlite3"
        filler = made.producer(widget_ids(20_000), env={"POST_LIMIT": "20"})
        broken = expect(filler, STORE, PARTLY, what=f"a producer on a full disk of {kilobytes} KiB")
        more = expect(made.consumer("--drain"), 0, STORE, what=f"a consumer on a full disk of {kilobytes} KiB")
        _remount(disk, "size=64m")
        made.drain("--post-batch", 20)
        return made.check().plus(broken, more)


def _fill_maker() -> Result:
    """The maker's disk is full: the consumer waits, and goes on by itself when there is room."""
    with world() as made, _disk(made, 256) as disk:
        made.database = disk / "widgets.sqlite3"
        made.post_ids(3_000)
        with made.maker() as maker:
            consumer = made.consumer("--post-batch", 20, "--drain")
            time.sleep(5)
            ended = [run for run in (maker, consumer) if run.process.poll() is not None]
            broken = "a full disk of the maker ended it" if ended else ""
            _remount(disk, "size=64m")
            more = expect(consumer, 0, what="a consumer whose maker has room again")
        return made.check().plus(broken, more)


def _read_only() -> Result:
    with world() as made, _disk(made, 4_096) as disk:
        made.queue = disk / "q.sqlite3"
        made.post_ids(10)
        _remount(disk, "ro")
        broken = expect(made.producer(widget_ids(1)), STORE, what="a producer on a read-only disk")
        more = expect(made.consumer(), STORE, what="a consumer on a read-only disk")
        _remount(disk, "rw")
        with made.maker():
            made.drain()
        return made.check().plus(broken, more)


def _damaged(what: str, damage: Callable[[Path, bytes], Any]) -> Result:
    """Each script on a file that was damaged: refused, and left as it is."""
    broken = []
    with world() as made:
        made.post([{"widget_id": id_, "note": "x" * 300} for id_ in widget_ids(200)])
        sound = made.queue.read_bytes()
        made.queue.unlink()
        damage(made.queue, sound)
        before = _content(made.queue)
        for name in ("widget_consumer.py", "widget_producer.py", "widget_maker.py"):
            is_maker = name == "widget_maker.py"
            where = ("--database", made.queue, "--port", made.port) if is_maker else ("--queue-url", made.url)
            broken.append(expect(made.start(name, *where), STORE, what=f"{name}, {what}"))
            broken.append(f"{name}, {what}: the file was changed" if _content(made.queue) != before else "")
    return Result({}, []).plus(*broken)


def _content(path: Path) -> Any:
    return path.read_bytes() if path.is_file() else path.lstat().st_mode


VERSION, APPLICATION = 60, 68
"""Where a SQLite file has them, in four bytes each."""
DAMAGES: dict[str, Callable[[Path, bytes], Any]] = {
    "a zeroed header": lambda path, sound: path.write_bytes(bytes(100) + sound[100:]),
    "a zeroed page": lambda path, sound: path.write_bytes(sound[:PAGE] + bytes(PAGE) + sound[2 * PAGE :]),
    "a file cut in the middle": lambda path, sound: path.write_bytes(sound[: len(sound) // 2]),
    "a last page cut": lambda path, sound: path.write_bytes(sound[:-1_000]),
    "a newer version": lambda path, sound: path.write_bytes(sound[:VERSION] + b"\0\0\0c" + sound[VERSION + 4 :]),
    "another program's file": lambda path, sound: path.write_bytes(
        sound[:APPLICATION] + b"\0\0\0\7" + sound[APPLICATION + 4 :]
    ),
    "one byte": lambda path, _: path.write_bytes(b"\n"),
    "text": lambda path, _: path.write_text("a diary\n" * 1_000),
    "a directory": lambda path, _: path.mkdir(),
    "a FIFO": lambda path, _: os.mkfifo(path),
    "a symlink to nothing": lambda path, _: path.symlink_to("no/such/file"),
    "a device": lambda path, _: path.symlink_to("/dev/zero"),
}
