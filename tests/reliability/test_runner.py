"""The runner: which campaigns run, what is kept of them, and the exit code."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from . import __main__ as runner
from .campaign import Campaign, Result

SOUND = Campaign("sound", "nothing breaks", lambda scale: Result({"n": round(1_000 * scale), "mark: seen": 1}))
BROKEN = Campaign("broken", "all breaks", lambda scale: Result({"n": 1}, ["C1 lost: 1 (a|b)"]))


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "CAMPAIGNS", [SOUND, BROKEN])
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "REPORT", tmp_path / "reliability.md")
    return tmp_path


def test_a_part_prints_its_figures_and_keeps_nothing(kept: Path) -> None:
    done = CliRunner().invoke(runner.main, ["--only", "sound", "--scale", "0.5"])
    assert (done.exit_code, done.output) == (0, "sound: n 500 (0 s)\n")
    assert list(kept.iterdir()) == []


def test_at_full_size_all_are_reported_and_a_violation_is_exit_code_1(kept: Path) -> None:
    done = CliRunner().invoke(runner.main)
    assert done.exit_code == 1
    assert "  BROKEN: C1 lost: 1 (a|b)\n" in done.output
    rows = [line for line in (kept / "reliability.md").read_text().splitlines() if line.startswith("|")][2:]
    assert [row.split(" | ")[:4] for row in rows] == [
        ["| sound", "nothing breaks", "n 1,000", "nothing"],
        ["| broken", "all breaks", "n 1", "C1 lost: 1 (a/b)"],
    ]


def test_a_name_that_no_campaign_has_is_refused() -> None:
    assert CliRunner().invoke(runner.main, ["--only", "sound,other"]).exit_code == 2
