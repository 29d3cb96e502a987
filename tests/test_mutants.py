"""The bugs of `make mutants` can be planted as they are written; that each is caught is for that target to show."""

import tomllib
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent.parent
MUTANTS = tomllib.loads((HERE / "tests" / "mutants.toml").read_text())


@pytest.mark.parametrize("name", MUTANTS)
def test_a_bug_can_be_planted_and_names_its_tests(name: str) -> None:
    mutant = MUTANTS[name]
    assert (HERE / mutant["file"]).read_text().count(mutant["old"]) == 1
    assert mutant["old"] != mutant["new"]
    assert all((HERE / test).exists() for test in mutant["tests"].split())
