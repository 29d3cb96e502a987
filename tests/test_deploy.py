"""The files of deploy/, as far as they can be checked without a machine of their own; completion in three shells."""

import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from support import HERE, tool_or_skip

import widget_consumer

PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())
DEPLOY = HERE / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
units = pytest.mark.parametrize("unit", UNITS, ids=[unit.stem for unit in UNITS])


def settings(unit: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.M))


def test_a_unit_starts_each_script_that_serves() -> None:
    started = {Path(settings(unit)["ExecStart"]).name for unit in UNITS}
    assert started == {"widget-consumer", "widget-maker"} <= PROJECT["project"]["scripts"].keys()


def test_systemd_waits_for_posts_in_flight_and_for_what_is_given_back() -> None:
    (deadline,) = [option.default for option in widget_consumer.cli.params if option.name == "deadline"]
    longest = deadline + widget_consumer.STOP_PATIENCE_S
    waits = float(settings(DEPLOY / "widget-consumer.service")["TimeoutStopSec"])
    assert longest < waits < 2 * longest


@units
def test_systemd_takes_the_unit(unit: Path, tmp_path: Path) -> None:
    analyze = tool_or_skip("systemd-analyze", package="systemd")
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/widgets/.venv/bin/", "/bin/true "))
    done = subprocess.run([analyze, "verify", here], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@units
def test_the_unit_may_do_little(unit: Path) -> None:
    analyze = tool_or_skip("systemd-analyze", package="systemd")
    command = [analyze, "security", "--offline=true", "--threshold=15", unit]  # 1.5 of 10
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-300:]


@units
def test_the_unit_lets_it_choose_its_core(unit: Path) -> None:
    """@resources holds that call, and a call that is not allowed ends the process; /proc/stat says who is busy."""
    lines = unit.read_text().splitlines()
    assert lines.index("SystemCallFilter=sched_setaffinity") > lines.index("SystemCallFilter=~@privileged @resources")
    assert "ProcSubset=pid" not in lines


def instructions() -> list[list[str]]:
    text = (DEPLOY / "Containerfile").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines() if line and not line.startswith("#")]


def test_the_container_holds_all_that_the_scripts_need(tmp_path: Path) -> None:
    """Its COPY lines, and the wheel that its last pip install makes of them."""
    source = tmp_path / "app"
    source.mkdir()
    for _, *names, target in [words for words in instructions() if words[0] == "COPY"]:
        for found in [path for name in names for path in HERE.glob(name)]:
            if found.is_dir():
                shutil.copytree(found, source / target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(found, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run([*command, "-w", tmp_path], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {path.name for path in HERE.glob("*.py")} | {
        str(path.relative_to(HERE))
        for name in ("claim_queues", "templates", "static")
        for path in HERE.glob(f"{name}/*.*")
    }
    assert wanted <= packed


def test_the_container_runs_as_a_user_that_may_write_its_state_alone() -> None:
    found = {words[0]: words[1:] for words in instructions()}
    assert found["USER"] == ["10001"]
    assert found["VOLUME"] == ["/var/lib/widgets"]
    assert "XDG_STATE_HOME=/var/lib/widgets" in found["ENV"]
    assert "--require-hashes" in " ".join(word for words in instructions() if words[0] == "RUN" for word in words)
    assert found["CMD"] == ["[widget-consumer]"]


COMPLETE = {
    "bash": """
        eval "$(_WIDGET_CONSUMER_COMPLETE=bash_source widget-consumer)"
        COMP_WORDS=(widget-consumer --max) COMP_CWORD=1
        _widget_consumer_completion widget-consumer --max widget-consumer
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "zsh": """
        autoload -Uz compinit && compinit -u -d "$HOME/.zcompdump"
        eval "$(_WIDGET_CONSUMER_COMPLETE=zsh_source widget-consumer)"
        words=(widget-consumer --max) CURRENT=2
        compadd() { print -l -- "$@" }
        _describe() { print -l -- "${(P@)3}" }
        _widget_consumer_completion
    """,
    "fish": """
        _WIDGET_CONSUMER_COMPLETE=fish_source widget-consumer | source
        complete -C 'widget-consumer --max'
    """,
}


@pytest.mark.parametrize("shell", COMPLETE)
def test_a_shell_completes_options(shell: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tool_or_skip(shell, package=shell)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    script = tmp_path / "script"
    script.write_text(COMPLETE[shell])
    done = subprocess.run([program, script], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "--max-receives" in done.stdout, done.stderr
    assert "--slots" not in done.stdout
