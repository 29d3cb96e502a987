"""What an installation holds: the sdist, the wheel made of it, its commands in an environment of their own; imports."""

import ast
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import requests
from support import ANSWER_S, HERE, free_port, run

PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text())["project"]
MODULES = {"receive_counts.py", "widget_consumer.py", "widget_maker.py", "widget_producer.py"}
OURS = {"claim_queues", "widgets", *(name.removesuffix(".py") for name in MODULES)}
SDKS = {"boto3", "botocore", "keystoneauth1", "openstack", "pyrax"}

pytestmark = [pytest.mark.xdist_group("package"), pytest.mark.timeout(600)]  # the first test installs for the others


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel made of the sdist that is made of this tree."""
    tree, built = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("built")
    not_source = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(HERE, tree, ignore=not_source, dirs_exist_ok=True)
    command = f"from setuptools import build_meta; build_meta.build_sdist({str(built)!r})"
    subprocess.run([sys.executable, "-c", command], cwd=tree, stdout=subprocess.DEVNULL, check=True)
    (sdist,) = built.glob("*.tar.gz")
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", built, sdist], check=True)
    (found,) = built.glob("*.whl")
    return found


def test_the_wheel_holds_four_modules_and_two_packages(wheel: Path) -> None:
    of_packages = [path for package in ("claim_queues", "widgets") for path in HERE.glob(f"{package}/**/*.*")]
    wanted = MODULES | {str(path.relative_to(HERE)) for path in of_packages if "__pycache__" not in path.parts}
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {"claim_queues/static/pages.css", "claim_queues/templates/page.html", "widgets/static/widgets.css"} <= packed
    assert packed == wanted


INSTALLERS = [["uv", "tool", "install", "--system-certs"], ["pipx", "install", "--backend", "pip"]]


@pytest.fixture(scope="module", params=INSTALLERS, ids=["uv", "pipx"])
def installed(request: pytest.FixtureRequest, wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where that tool puts the commands of the wheel, without an extra."""
    home = tmp_path_factory.mktemp("home")
    places = {"UV_TOOL_DIR": home, "UV_TOOL_BIN_DIR": home / "bin", "PIPX_HOME": home, "PIPX_BIN_DIR": home / "bin"}
    command = [sys.executable, "-m", *request.param, "--quiet", wheel]
    subprocess.run(command, env=os.environ | places, check=True)
    return home / "bin"


@pytest.mark.slow
@pytest.mark.parametrize("command", ["widget-producer", "widget-consumer", "widget-maker", "claim-queues"])
def test_the_wheel_brings_commands_that_work_anywhere(command: str, installed: Path, tmp_path: Path) -> None:
    done = run(installed / command, "--version", cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{command}, version 0.2.0\n", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("url", "extra", "package"),
    [
        ("sqs://us-east-1", "sqs", "boto3"),
        ("zaqar://cloud", "zaqar", "openstacksdk"),
        ("rackspace://user@DFW", "rackspace", "pyrax"),
    ],
    ids=lambda value: value.partition(":")[0],
)
def test_a_service_without_its_packages_says_what_to_install(
    url: str, extra: str, package: str, installed: Path, tmp_path: Path
) -> None:
    done = run(installed / "claim-queues", "stats", "--queue-url", url, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert package in line
    assert f"pip install '.[{extra}]'" in line


@pytest.mark.slow
def test_the_installed_tool_has_its_page(installed: Path, tmp_path: Path) -> None:
    command = [installed / "claim-queues", "web", "--create", "--port", str(free_port())]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as tool:
        try:
            assert tool.stderr
            link = next(line.split()[-1] for line in tool.stderr if "token=" in line)
            with requests.Session() as browser:
                assert "Dead letters" in browser.get(link, timeout=ANSWER_S).text
                assert browser.get(link.partition("?")[0] + "static/pages.css", timeout=ANSWER_S).ok
        finally:
            tool.terminate()
    assert tool.returncode == 0


def test_requirements_txt_names_what_pyproject_does() -> None:
    """For plain pip; it leaves out zaqar, which contradicts rackspace, and brings honcho for `make run`."""
    extras = PROJECT["optional-dependencies"]
    wanted = {*PROJECT["dependencies"], *extras["rackspace"], *extras["sqs"], "honcho>=2.0"}
    lines = (HERE / "requirements.txt").read_text().replace('"', "'").splitlines()
    assert {line for line in lines if line and not line.startswith("#")} == wanted


def imported(file: str) -> set[str]:
    """The project's modules whose things a file imports, wherever in it: `claim_queues.errors`, `widgets.store`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((HERE / file).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in OURS:
            things = [getattr(import_module(node.module), alias.name) for alias in node.names]
            found |= {getattr(thing, "__module__", getattr(thing, "__name__", node.module)) for thing in things}
    return {name for name in found if name.partition(".")[0] in OURS}


@pytest.mark.parametrize("file", sorted(MODULES))
def test_no_script_is_imported_and_receive_counts_know_queues_alone(file: str) -> None:
    roots = {name.partition(".")[0] for name in imported(file)}
    assert roots <= ({"claim_queues"} if file == "receive_counts.py" else {"claim_queues", "receive_counts", "widgets"})


def test_the_maker_knows_no_queue() -> None:
    of_queues = {name for name in imported("widget_maker.py") if name.startswith("claim_queues")}
    assert of_queues <= {f"claim_queues.{name}" for name in ("cli", "errors", "keyrings", "pages", "sqlite")}


@pytest.mark.parametrize(
    ("module", "others"),
    [
        ("widget_producer", SDKS),
        ("widget_consumer", SDKS | {"flask", "waitress", "rich.live"}),
        ("widget_maker", SDKS),
        ("claim_queues.__main__", SDKS | {"flask", "waitress", "jinja2"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_option_asks_for_is_not_loaded(module: str, others: set[str]) -> None:
    done = run(sys.executable, "-c", f"import sys, {module}; print(*sys.modules)", cwd=HERE)
    loaded = set(done.stdout.split())
    assert module in loaded, done.stderr
    assert not others & loaded
