"""Campaigns against the storage: power cuts, full and read-only disks, damaged and foreign files, flipped bits."""

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import apsw
from support import wait_until

from .campaign import Campaign, Result
from .recorded import Plan
from .trial import (
    CLAIM_TTL,
    Run,
    Trial,
    add,
    scaled,
    side_by_side,
    start_forks,
    trial,
    widget_ids,
)

HERE = Path(__file__).parent
CUTS, CUTS_PER_FILE = 300, 10
PAGE = 4096
EXIT_STORE = 5
PROMPTLY_S = 2.0


# Power cuts


def cut_power(scale: float, bug: str = "") -> Result:
    """The power goes while all work; then each file is as at its last sync, or a mix of that and what followed."""
    if shutil.which("gcc") is None:
        return Result({"n": 0, "note": "not run: gcc is missing"})
    cuts = scaled(CUTS, scale)
    chains = [(seed, min(CUTS_PER_FILE, cuts - seed)) for seed in range(0, cuts, CUTS_PER_FILE)]
    figures: dict[str, Any] = {"n": cuts, "integrity checks": 0}
    violations: list[str] = []
    with tempfile.TemporaryDirectory() as directory:
        shim = str(Path(directory) / "power.so")
        command = ["gcc", "-O1", "-shared", "-fPIC", "-o", shim, str(HERE / "power.c"), "-ldl"]
        subprocess.run(command, check=True)
        start_forks(LD_PRELOAD=shim)
        try:
            for checks, counts, broken in side_by_side(lambda chain: _cut(*chain, shim, bug), chains, 2):
                figures["integrity checks"] += checks
                add(figures, counts)
                violations += broken
        finally:
            start_forks()
    return Result(figures, violations)


def _cut(seed: int, cuts: int, shim: str, bug: str) -> tuple[int, dict[str, int], list[str]]:
    chance = random.Random(seed)
    plan = Plan(claim_ttl=CLAIM_TTL, bug=bug)
    damage: list[str] = []
    with trial() as made:
        synced = made.directory / ".synced"
        for _ in range(cuts):
            shutil.rmtree(synced, ignore_errors=True)
            synced.mkdir()
            for path in _files(made):
                shutil.copy(path, synced)
            with made.maker(env={"LD_PRELOAD": shim}):
                runs = [made.consumer(*options, plan=plan) for options in ((), ("--post-batch", 20))]
                poster = Plan(history=made.path("unused"), post_batch=chance.choice((1, 10, 100)), bug=bug)
                producers = [made.producer(widget_ids(chance.choice((30, 600))), poster) for _ in range(2)]
                runs += producers
                _wait_for_one_that_printed(producers)
                time.sleep(chance.uniform(0, 0.4))
                for run in runs:
                    run.kill()
            made.deaths += len(runs)
            before = len(made.acknowledged)
            made.read_producers()
            if len(made.acknowledged) == before:
                damage.append("nothing was acknowledged before the cut")
            made.cuts.append(int(time.time() * 1000))
            _go_back(made, synced, chance if chance.random() < 0.5 else None)
            damage += made.damage()
        shutil.rmtree(synced)
        with made.maker():
            made.drain("--post-batch", 20)
        return (2 * cuts, *_with(made.check(), damage))


def _wait_for_one_that_printed(runs: Sequence[Run]) -> None:
    wait_until(lambda: any(run.out.stat().st_size for run in runs))


def _with(checked: tuple[dict[str, int], list[str]], more: list[str]) -> tuple[dict[str, int], list[str]]:
    return checked[0], more + checked[1]


def _files(made: Trial) -> Iterator[Path]:
    for path in (made.queue, made.database):
        for suffix in ("", "-wal", "-journal"):
            if (found := path.with_name(path.name + suffix)).exists():
                yield found


def _go_back(made: Trial, synced: Path, chance: random.Random | None) -> None:
    """Leave what the disk holds after the cut. chance: page by page, what was not synced may have reached it too."""
    for path in _files(made):
        kept = synced / path.name
        old = kept.read_bytes() if kept.exists() else b""
        if chance is not None:
            old = _mix(old, path.read_bytes(), chance)
        if old or kept.exists():
            path.write_bytes(old)
        else:
            path.unlink()
    present = {path.name for path in _files(made)}
    for kept in synced.iterdir():
        if kept.name not in present and not kept.name.startswith("."):  # its unlink had not reached the disk
            shutil.copy(kept, made.directory)
    for path in made.directory.glob("*-shm"):
        path.unlink()


def _mix(old: bytes, new: bytes, chance: random.Random) -> bytes:
    if len(new) < len(old):  # another file of that name: of a file only its own content can be mixed
        return chance.choice((old, new))
    pages = [
        chance.choice((old, new))[start : start + PAGE] for start in range(0, chance.choice((len(old), len(new))), PAGE)
    ]
    size = max(len(old), len(new))
    whole = b"".join(page.ljust(PAGE, b"\0") for page in pages)
    return whole[:size]


# Full and read-only disks


def fill_disks(scale: float) -> Result:
    """Queue, then maker, on disks that fill up, at many sizes; and files that are none of ours."""
    figures: dict[str, Any] = {"n": 0}
    violations: list[str] = []
    cases: list[Callable[[], tuple[dict[str, int], list[str]]]] = []
    cases += [lambda case=case: _damage(*case) for case in _damages()]
    if os.geteuid() == 0 and _can_mount():
        sizes = range(128, 1_024, 64)
        cases += [lambda size=size: _fill(size) for size in sizes[:: max(1, round(1 / scale))]]
        cases += [_fill_maker, _read_only]
    else:
        figures["note"] = "full and read-only disks not tried: mounting a tmpfs needs root"
    for counts, broken in side_by_side(lambda case: case(), cases, 2):
        figures["n"] += 1
        add(figures, counts)
        violations += broken
    return Result(figures, violations)


def _can_mount() -> bool:
    with tempfile.TemporaryDirectory() as directory:
        try:
            with _disk(Path(directory), 128):
                return True
        except subprocess.CalledProcessError:
            return False


@contextmanager
def _disk(directory: Path, kilobytes: int) -> Iterator[Path]:
    where = directory / "disk"
    where.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", where], check=True, capture_output=True
    )
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def _remount(where: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", where], check=True)


def _fill(kilobytes: int) -> tuple[dict[str, int], list[str]]:
    """The queue's disk fills up under a producer, then under a consumer that settles; then there is room."""
    with trial() as made, _disk(made.directory, kilobytes) as disk, made.maker():
        made.queue = disk / "q.sqlite3"
        filler = made.producer(widget_ids(20_000), Plan(history=made.path("unused"), post_batch=20))
        violations = _expect(filler, (EXIT_STORE, 6), "a producer on a full disk")
        consumer = made.consumer(drain=True)
        violations += _expect(consumer, (0, EXIT_STORE), "a consumer on a full disk")
        _remount(disk, "size=64m")
        made.drain("--post-batch", 20)
        counts, broken = made.check()
        return counts, [f"{kilobytes} KiB: {line}" for line in violations + broken]


def _fill_maker() -> tuple[dict[str, int], list[str]]:
    """The maker's disk is full: it says so, the consumer waits, and goes on by itself when there is room."""
    with trial() as made, _disk(made.directory, 256) as disk:
        made.database = disk / "widgets.sqlite3"
        made.post([{"widget_id": id_} for id_ in widget_ids(6_000)])
        with made.maker():
            consumer = made.consumer("--post-batch", 20, drain=True)
            consumer.process.join(8)
            violations = [] if consumer.is_running else ["a full disk of the maker ended the consumer"]
            _remount(disk, "size=64m")
            violations += _expect(consumer, (0,), "a consumer whose maker has room again")
        counts, broken = made.check()
        if counts["ok"] != 6_000 or made.evidence().dead_letters:
            broken.append("not all were made")
        return counts, [f"the maker's disk: {line}" for line in violations + broken]


def _read_only() -> tuple[dict[str, int], list[str]]:
    with trial() as made, _disk(made.directory, 4_096) as disk:
        made.queue = disk / "q.sqlite3"
        made.post([{"widget_id": id_} for id_ in widget_ids(10)])
        _remount(disk, "ro")
        violations = _expect(made.producer(widget_ids(1)), (EXIT_STORE,), "a producer on a read-only disk")
        violations += _expect(made.consumer(), (EXIT_STORE,), "a consumer on a read-only disk")
        _remount(disk, "rw")
        with made.maker():
            made.drain()
        counts, broken = made.check()
        return counts, violations + broken


def _expect(run: Run, codes: tuple[int, ...], what: str, within: float = 60) -> list[str]:
    try:
        code = run.wait(within)
    except AssertionError as error:
        return [f"{what}: {error}"]
    said = run.err.read_text(errors="replace")
    found = [] if code in codes else [f"{what}: exit code {code}: {said[-300:]}"]
    return found + ([f"{what}: a traceback"] if "Traceback" in said else [])


# Damaged and foreign files


def _damages() -> list[tuple[str, Callable[[Path], None], tuple[int, ...]]]:
    """What lies where the file should be, and the exit codes that are right for it."""

    def patch(at: int, data: bytes) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            whole = bytearray(path.read_bytes())
            whole[at : at + len(data)] = data
            path.write_bytes(whole)

        return write

    def pragma(text: str) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            with closing(apsw.Connection(str(path))) as file:
                file.execute(f"PRAGMA {text}")

        return write

    def instead(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def write(path: Path) -> None:
            path.unlink()
            make(path)

        return write

    def other(path: Path) -> None:
        text = path.with_name("text")
        text.write_text("a diary\n" * 1_000)
        path.symlink_to(text)

    refused, fine = (EXIT_STORE,), (0,)
    return [
        ("a damaged header", patch(0, b"SQLite format 4"), refused),
        ("a zeroed header", patch(0, bytes(100)), refused),
        ("a file cut in the middle", lambda path: os.truncate(path, path.stat().st_size // 2), refused),
        ("a last page cut", lambda path: os.truncate(path, path.stat().st_size - 1_000), refused),
        ("a zeroed page", patch(PAGE, bytes(PAGE)), refused),
        ("a zeroed page of messages", patch(6 * PAGE, bytes(PAGE)), refused),
        ("a newer version", pragma("user_version = 99"), refused),
        ("another program's file", pragma("application_id = 7"), refused),
        ("an empty file", instead(lambda path: path.touch()), fine),
        ("one byte", instead(lambda path: path.write_bytes(b"\n")), refused),
        ("text", instead(lambda path: path.write_text("a diary\n" * 1_000)), refused),
        ("a directory", instead(lambda path: path.mkdir()), refused),
        ("a FIFO", instead(os.mkfifo), refused),
        ("a symlink to text", instead(other), refused),
        ("a symlink to nothing", instead(lambda path: path.symlink_to("nothing")), refused),
        ("a device", instead(lambda path: path.symlink_to("/dev/zero")), refused),
    ]


def _damage(what: str, damage: Callable[[Path], None], codes: tuple[int, ...]) -> tuple[dict[str, int], list[str]]:
    """Run each script on a file that was damaged: refused in time, and left as it is."""
    violations = []
    for script in ("widget_consumer", "widget_producer", "widget_maker"):
        with trial() as made:
            made.post([{"widget_id": id_, "note": "x" * 300} for id_ in widget_ids(200)])
            damage(made.queue)
            before = _checksum(made.queue)
            if script == "widget_maker":
                if codes == (0,):
                    continue
                run = made.run_plain(script, "--database", made.queue, "--port", made.maker_url.rpartition(":")[2])
            else:
                options = ["--drain", "--maker-url", made.maker_url] if script == "widget_consumer" else []
                run = made.run(script, *options)
            found = _expect(run, codes, what, PROMPTLY_S)
            if codes == (EXIT_STORE,) and _checksum(made.queue) != before:
                found.append(f"{what}: the file was changed")
            violations += [f"{script}: {line}" for line in found]
    return {"files": 1}, violations


def _checksum(path: Path) -> str:
    if not path.is_file():
        return str(path.lstat().st_mode)
    return hashlib.sha256(path.read_bytes()).hexdigest()


CAMPAIGNS = [
    Campaign("powercuts", "a power cut at a random time: nothing acknowledged is lost, no file is damaged", cut_power),
    Campaign("disk", "full and read-only disks, damaged and foreign files: exit 5, the file left as it is", fill_disks),
]
