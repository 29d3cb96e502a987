"""Plant each bug of mutants.toml in a copy of the project and see that the tests it names go red: `make mutants`.

Names given as arguments choose single bugs.
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TESTS_FAILED = 1


def main() -> int:
    mutants = tomllib.loads((HERE / "tests" / "mutants.toml").read_text())
    chosen = sys.argv[1:] or list(mutants)
    caught = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, problem in zip(chosen, pool.map(lambda name: plant(mutants[name]), chosen), strict=True):
            caught += not problem
            print(f"{problem or 'caught':9} {name}", flush=True)
    print(f"{caught} of {len(chosen)} bugs caught")
    return int(caught < len(chosen))


def plant(mutant: dict[str, str]) -> str:
    """Why the bug was not caught; empty where it was."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "project"
        shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "bench"))
        (copy / ".venvs").symlink_to(HERE / ".venvs")  # the queue servers
        target = copy / mutant["file"]
        text = target.read_text()
        if text.count(mutant["old"]) != 1:
            return f"STALE: {mutant['file']} holds {text.count(mutant['old'])} times, not once: {mutant['old']}"
        target.chmod(0o644)
        target.write_text(text.replace(mutant["old"], mutant["new"]))
        command = [sys.executable, "-m", "pytest", "-qx", "-n0", "-m", "", "-p", "no:cacheprovider"]
        command += shlex.split(mutant["tests"])
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode not in (0, TESTS_FAILED):
            return f"NOT RUN: {mutant['tests']}: {done.stdout[-500:]}{done.stderr[-500:]}"
        return "" if done.returncode else "SURVIVED"


if __name__ == "__main__":
    sys.exit(main())
