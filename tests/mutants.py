"""Plant each bug of mutants.toml in a copy of the project and see that the tests it names go red: `make mutants`.

Names given as arguments choose single bugs.
"""

import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
TESTS_FAILED = 1


def main() -> int:
    mutants = tomllib.loads((HERE / "tests" / "mutants.toml").read_text())
    if chosen := sys.argv[1:]:
        mutants = {name: mutants[name] for name in chosen}
    survivors = []
    for name, mutant in mutants.items():
        caught = _is_caught(mutant)
        print(f"{'caught' if caught else 'SURVIVED':9} {name}", flush=True)
        if not caught:
            survivors.append(name)
    print(f"{len(mutants) - len(survivors)} of {len(mutants)} bugs caught")
    return 1 if survivors else 0


def _is_caught(mutant: dict[str, str]) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "project"
        shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".*", "__pycache__"))
        target = copy / mutant["file"]
        text = target.read_text()
        if text.count(mutant["old"]) != 1:
            sys.exit(f"{mutant['file']}: holds {text.count(mutant['old'])} times, not once: {mutant['old']}")
        target.write_text(text.replace(mutant["old"], mutant["new"]))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *mutant["tests"].split()]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        if done.returncode not in (0, TESTS_FAILED):
            sys.exit(f"the tests did not run:\n{done.stdout}{done.stderr}")
        return done.returncode == TESTS_FAILED


if __name__ == "__main__":
    sys.exit(main())
