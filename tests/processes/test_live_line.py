"""What commands show at a terminal: a live line under a consumer's log, and tables; nothing of it in a log of lines."""

import re
import time
from contextlib import closing
from typing import Any

import pytest
from doubles.scripted_maker import Reply
from rig import Rig, numbered
from support import wait_until
from terminal import Terminal

LINE = re.compile(
    r"(maker \w+  )?[\d,]+/s  \d+ in flight  (?P<queued>[\d,]+|\?) queued(?P<left> \d:\d\d:\d\d left)?"
    r"(  (?P<created>[\d,]+) created)?(  \d+ failed)?"
)
HELD = 80
"""More messages than a consumer with four slots and POSTs of 60 ms holds: about 17 for each slot."""
LOG = re.compile(r"\d\d:\d\d:\d\d \[\w+\] \w.*")


def live(terminal: Terminal) -> list[str]:
    """Each live line that was there for a time."""
    return re.findall(r"\x1b\[2K([^\x1b\n]*in flight[^\x1b\n]*?)(?=\r)", terminal.shown)


def lines(terminal: Terminal) -> list[str]:
    """What one sees at the end, without colours."""
    text = re.sub(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]", "", terminal.shown).replace("\n\r\x1b[1A", "")
    return [line.rsplit("\x1b[2K", 1)[-1].strip("\r") for line in text.split("\n")]


def consuming(rig: Rig, *options: object, **how: Any) -> closing[Terminal]:
    words = ["--queue-url", f"sqlite:///{rig.file}", "--maker-url", rig.maker.url, "--receive-counts", rig.counts_file]
    return closing(Terminal("widget_consumer.py", *words, *options, **how))


@pytest.mark.slow
def test_a_live_line_tells_depth_and_outcomes_of_the_same_moment_under_a_whole_log(rig: Rig) -> None:
    rig.maker.answer = lambda post: time.sleep(0.06) or rig.maker.make(post)
    with consuming(rig, "--slots", 4) as running:
        wait_until(lambda: any("0 in flight  0 queued" in line for line in live(running)))
        rig.post(*numbered("w", 600))
        wait_until(lambda: rig.left() == 0)
        wait_until(lambda: any(line.endswith("0 in flight  0 queued  600 created") for line in live(running)))
        running.process.terminate()
        assert running.exit_code() == 0
    told = [LINE.fullmatch(line) or pytest.fail(line) for line in live(running)]
    known = [line for line in told if line["queued"] != "?"]
    moments = [(int(line["queued"]), int(line["created"] or 0)) for line in known]
    assert len(set(moments)) > 3
    # What is being settled at that moment may be missing in both numbers, or counted in both.
    assert [moment for moment in moments if 0 < sum(moment) < 600 - HELD or sum(moment) > 600 + HELD] == []
    assert any(line["left"] for line in known)
    log = lines(running)
    assert log.pop() == ""  # the live line is gone
    assert [line for line in log if not LOG.fullmatch(line)] == []
    created = [line for line in log if "] created widget=" in line]
    assert len(created) == 600
    assert max(map(len, created)) <= 80 - 36 + len("w599")  # a true widget id has 36 characters


def test_an_open_breaker_stands_first_in_a_line_that_fits_the_terminal(rig: Rig) -> None:
    rig.maker.answer, rig.maker.health = (lambda post: 401), Reply(503)
    rig.post("w")
    with consuming(rig, columns=37) as running:
        wait_until(lambda: "maker misconfigured  0/s  0 in flight" in live(running))
        assert {len(line) for line in live(running)} <= set(range(38))
        assert "\x1b[" in running.shown


@pytest.mark.parametrize(("term", "options"), [("dumb", []), ("xterm", ["--log-format", "json"])], ids=["dumb", "json"])
def test_a_dumb_terminal_and_a_log_in_json_get_plain_lines(rig: Rig, term: str, options: list[str]) -> None:
    rig.post("a", "b")
    with consuming(rig, "--drain", *options, term=term) as running:
        assert running.exit_code() == 0
    assert running.shown.count("created") >= 2
    assert "\x1b" not in running.shown
    assert "in flight" not in running.shown


def test_messages_are_a_table_with_a_head_that_fits_the_terminal(rig: Rig) -> None:
    rig.post("w" * 300, "[bold]x[/bold]")
    words = ["-m", "claim_queues", "peek", "--queue-url", f"sqlite:///{rig.file}"]
    with closing(Terminal(*words, columns=70)) as running:
        assert running.exit_code() == 0
    head, first, second = (line.rstrip() for line in lines(running)[:-1])
    assert head.split() == ["id", "age", "receives", "body"]
    assert (first[-1], len(first)) == ("…", 70)
    assert "[bold]x[/bold]" in second
