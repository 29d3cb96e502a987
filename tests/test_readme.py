"""README cannot lie: its option tables are the commands' own, and its commands run as they are written."""

import re
import shlex
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import readme
from support import HERE, Script, free_port, is_healthy, script, wait_until

import claim_queues.__main__

TEXT = readme.README.read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.S) for line in block.splitlines()]
PYTHON = ".venv/bin/python "
SUBMIT_AND_WAIT = {
    "widget_producer.py --widget-id=31f37378-54f4-11e5-ad75-3c970e65f731 --wait": (
        0,
        "31f37378-54f4-11e5-ad75-3c970e65f731 created",
    ),
    "widget_producer.py --widget-id=this_is_not_a_valid_widget_id --wait": (
        1,
        "this_is_not_a_valid_widget_id rejected ",
    ),
}


def test_the_option_tables_are_those_of_the_commands() -> None:
    assert readme.written() == TEXT, "run `make readme`"


@pytest.mark.parametrize("command", ["peek", "dead-letters", "redrive"])
def test_the_columns_of_the_tool_stand_in_readme(command: str) -> None:
    (columns,) = re.findall(r": ([A-Z_]+ [A-Z_ ]+)\.", claim_queues.__main__.cli.commands[command].help or "")
    assert f"prints `{columns}`" in " ".join(TEXT.split())


def test_make_targets_in_readme_exist() -> None:
    targets = re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), re.M)
    for named in re.findall(r"(?<=`)make ([a-z-]+)", TEXT) + re.findall(r"^make ([a-z-]+)", "\n".join(COMMANDS), re.M):
        assert named in targets


def test_relative_links_in_readme_lead_somewhere() -> None:
    headings = re.findall(r"^#+ (.*)", TEXT, re.M)
    anchors = {"#" + re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert [target for target in targets if target not in anchors and not (HERE / target).exists()] == []


def test_files_in_readmes_tree_exist() -> None:
    tree = TEXT[TEXT.rindex("```\nwidget_producer.py  widget") :]
    for line in tree.splitlines()[1:-1]:
        folder = "claim_queues" if line.startswith("  ") else ""
        for name in re.findall(r"[a-z_]+(?:\.py|/)", line.split("    ")[0] + "  "):
            assert (HERE / folder / name).exists(), name


@pytest.fixture
def three_terminals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ExitStack:
    """Maker and consumer started by README's own lines, on a free port."""
    port = free_port()
    monkeypatch.setenv("WIDGET_PORT", str(port))
    monkeypatch.setenv("WIDGET_MAKER_URL", f"http://127.0.0.1:{port}/widgets")
    with ExitStack() as stack:
        running: list[Script] = []
        for line in ("widget_maker.py", "widget_consumer.py"):
            assert PYTHON + line in COMMANDS
            running.append(stack.enter_context(script(line, cwd=tmp_path)))
        wait_until(lambda: is_healthy(f"http://127.0.0.1:{port}") and "consuming" in running[1].err)
        yield stack


@pytest.mark.usefixtures("three_terminals")
def test_the_commands_run_as_written(tmp_path: Path) -> None:
    ran = 0
    for line in COMMANDS:
        command = line.removeprefix(PYTHON)
        if not line.startswith(PYTHON) or command in ("widget_maker.py", "widget_consumer.py"):
            continue
        words = [str(HERE / word) if word.endswith(".py") else word for word in shlex.split(command)]
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True, check=False)
        code, out = SUBMIT_AND_WAIT.get(command, (0, ""))
        assert (done.returncode, done.stdout[: len(out)]) == (code, out), done.stderr
        ran += 1
    assert ran >= 9
