"""`pytest` alone, in an environment that plain pip makes of the two requirements.txt, without make and its servers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import HERE, tool_or_skip

DEBIAN_12 = "pip==23.0.1"
"""Python 3.12 and newer cannot run it: they keep their own."""

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("plain"), pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its programs. It is made before a test has a home of its own, and so finds what pip has in its cache."""
    tool_or_skip("cc", package="gcc")  # builds netifaces, for pyrax
    environment = tmp_path_factory.mktemp("plain")
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    files = ["-r", HERE / "requirements.txt", "-r", HERE / "tests" / "requirements.txt"]
    for wanted in [files] if sys.version_info >= (3, 12) else [[DEBIAN_12, "wheel"], files]:
        command = [environment / "bin" / "pip", "install", "--quiet", *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    return environment / "bin"


def test_pytest_alone_is_green_and_runs_the_mocked_pyrax(environment: Path, tmp_path: Path) -> None:
    project = tmp_path / "project"
    made = (".git", ".venv", ".venvs", ".*_cache", ".hypothesis", ".coverage*", "__pycache__", "build", "dist")
    shutil.copytree(HERE, project, ignore=shutil.ignore_patterns(*made))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST_"))}
    command = [environment / "pytest", "-v"]
    done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert "PASSED tests/services/test_cloud_queues_mocked.py::" in done.stdout
    assert "SKIPPED tests/services/test_cloud_queues_mocked.py::" not in done.stdout
