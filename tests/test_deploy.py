"""The files of deploy/, as far as they can be checked without a machine of their own; completion in three shells."""

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import queue_servers
import requests
import yaml
from support import ANSWER_S, HERE, free_port, run, run_script, script, tool_or_skip, wait_until, widget_maker

DEPLOY = HERE / "deploy"
SERVICES = yaml.safe_load((DEPLOY / "compose.yml").read_text())["services"]
UNITS = sorted(DEPLOY.glob("*.service"))
units = pytest.mark.parametrize("unit", UNITS, ids=[unit.stem for unit in UNITS])


def settings(unit: Path) -> dict[str, str]:
    return dict(re.findall(r"^(\w+)=(.*)$", unit.read_text(), re.M))


def test_a_unit_starts_each_script_that_serves() -> None:
    started = {Path(settings(unit)["ExecStart"]).name for unit in UNITS}
    assert started == {"widget-consumer", "widget-maker"}


@units
def test_what_needs_a_person_is_not_restarted(unit: Path) -> None:
    """2: usage or configuration, 4: credentials, 5: a local file."""
    assert settings(unit)["RestartPreventExitStatus"] == "2 4 5"
    assert settings(unit)["StateDirectory"] == "widgets"


def test_systemd_waits_for_posts_in_flight_and_for_their_settlement() -> None:
    """By default a POST takes at most 20 s; it is settled within 10 s more."""
    assert 30 < float(settings(DEPLOY / "widget-consumer.service")["TimeoutStopSec"]) <= 60


@units
def test_systemd_takes_the_unit_which_may_do_little(unit: Path, tmp_path: Path) -> None:
    analyze = tool_or_skip("systemd-analyze", package="systemd")
    here = tmp_path / unit.name
    here.write_text(unit.read_text().replace("/opt/widgets/.venv/bin/", "/bin/true "))
    done = run(analyze, "verify", here)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    done = run(analyze, "security", "--offline=true", "--threshold=15", unit)  # 1.5 of 10
    assert done.returncode == 0, done.stdout[-300:]


def instructions() -> dict[str, list[str]]:
    """By its first word, the last of each kind of instruction of the Containerfile; COPY: what all of them name."""
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", "").splitlines()
    words = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    found = {name: shlex.split(rest) for name, rest in words}
    return found | {"COPY": [name for kind, rest in words if kind == "COPY" for name in rest.split()[:-1]]}


def test_the_container_is_given_all_that_the_wheel_is_made_of(tmp_path: Path) -> None:
    for path in [path for name in instructions()["COPY"] for path in HERE.glob(name)]:
        if path.is_dir():
            shutil.copytree(path, tmp_path / path.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(path, tmp_path)
    offline = ["--no-deps", "--no-build-isolation", "--no-index"]
    built = run(sys.executable, "-m", "pip", "wheel", "-q", *offline, "-w", tmp_path / "built", tmp_path)
    assert built.returncode == 0, built.stderr
    assert {path.name for path in tmp_path.glob("*.py")} == {path.name for path in HERE.glob("*.py")}


def test_the_container_runs_as_a_user_that_may_write_its_state_alone() -> None:
    found = instructions()
    assert found["USER"] == ["10001"]
    assert found["VOLUME"] == ["/var/lib/widgets"]
    assert "XDG_STATE_HOME=/var/lib/widgets" in (DEPLOY / "Containerfile").read_text().split()
    assert found["CMD"] == ["[widget-consumer]"]


def test_the_container_knows_whether_its_script_is_healthy(tmp_path: Path) -> None:
    lines = (DEPLOY / "Containerfile").read_text().replace("\\\n", "")
    (check,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", lines, re.M)
    port = free_port()
    _, *words = json.loads(check.replace("8000", str(port)))
    with widget_maker(tmp_path, port=port):
        assert run(sys.executable, *words).returncode == 0
    assert run(sys.executable, *words).returncode == 1


def test_the_images_are_sent_what_they_copy_and_nothing_else() -> None:
    sent = re.findall(r"^!(.*)$", (HERE / ".dockerignore").read_text(), re.M)
    (of_sqs,) = re.findall(r"^COPY (.*) \./$", SERVICES["sqs"]["build"]["dockerfile_inline"], re.M)
    assert set(sent) == {*instructions()["COPY"], *of_sqs.split()}


def test_compose_brings_a_request_from_sqs_to_the_maker(tmp_path: Path) -> None:
    """Without containers: the settings of its services, at ports of this machine."""
    pytest.importorskip("boto3")
    port = free_port()
    with queue_servers.sqs(tmp_path / "log") as queue_url:
        moved = {"http://127.0.0.1:9324": queue_url, "http://maker:8000": f"http://localhost:{port}"}

        def settings_of(service: str) -> dict[str, str]:
            found = {"XDG_STATE_HOME": str(tmp_path / service), **SERVICES[service]["environment"]}
            return {name: re.sub("|".join(moved), lambda old: moved[old[0]], value) for name, value in found.items()}

        with (
            script("widget_maker.py", "--port", port, cwd=tmp_path, env=settings_of("maker")),
            script("widget_consumer.py", cwd=tmp_path, env=settings_of("consumer")) as consumer,
        ):
            wait_until(lambda: "consuming" in consumer.err)
            run_script("widget_producer.py", cwd=tmp_path, env=settings_of("consumer")).check_returncode()
            wait_until(lambda: "outcome=created" in consumer.err)


def test_prometheus_takes_the_alerts() -> None:
    promtool = tool_or_skip("promtool", package="prometheus")
    done = run(promtool, "check", "rules", DEPLOY / "prometheus-alerts.yml")
    assert done.returncode == 0, done.stderr


def test_alerts_and_dashboard_ask_for_metrics_that_there_are(tmp_path: Path) -> None:
    asked = "".join((DEPLOY / name).read_text() for name in ("prometheus-alerts.yml", "grafana-dashboard.json"))
    wanted = set(re.findall(r"widget_(?:consumer|maker)_\w+", asked))
    port = free_port()
    with widget_maker(tmp_path) as (url, _):
        options = ["--maker-url", f"{url}/widgets", "--metrics-port", port]
        with script("widget_consumer.py", *options, cwd=tmp_path):
            run_script("widget_producer.py", "--wait", cwd=tmp_path)

            def served() -> set[str]:
                urls = [f"{url}/metrics", f"http://127.0.0.1:{port}/metrics"]
                pages = [requests.get(each, timeout=ANSWER_S).text for each in urls]
                return set(re.findall(r"^(?:# TYPE )?(\w+)", "\n".join(pages), re.M))

            wait_until(lambda: "widget_consumer_queue_oldest_age_seconds" in served())
            assert len(wanted) > 10
            assert not wanted - served()


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
    commands = Path(sys.executable).parent
    if not (commands / "widget-consumer").exists():
        pytest.skip("needs the commands (pip install --editable .)")
    monkeypatch.setenv("PATH", f"{commands}:/usr/bin:/bin")
    (tmp_path / "script").write_text(COMPLETE[shell])
    done = run(program, tmp_path / "script")
    assert "--max-receives" in done.stdout, done.stderr
    assert "--slots" not in done.stdout
