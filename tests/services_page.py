"""Write the generated parts of docs/services.md: `make readme`.

They come from the contract's tests themselves: each is run up to its first operation on an object that has a service's
Limits and nothing else. One that skips says what the service cannot do, one that is expected to fail which defect it
meets; the rest must pass on the service, or the suite fails.
"""

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import readme

from claim_queues import Limits, cloud_queues, sqlite, sqs, zaqar

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "services.md"
COLUMNS: dict[str, tuple[str, Limits]] = {
    "sqs": ("SQS", sqs.LIMITS),
    "cloud-queues": ("Cloud Queues v1", cloud_queues.LIMITS),
    "zaqar-mongodb": ("Zaqar v2, MongoDB", zaqar.LIMITS),
    "zaqar-redis": ("Zaqar v2, Redis", zaqar.LIMITS),
    "embedded": ("embedded", sqlite.LIMITS),
}
"""By the names of tests/contract: a column's head, and what the service declares."""


class Reached(Exception):
    """The test asks the service for something, so it is meant for this service."""


class LimitsAlone:
    """In the place of a service and of its queues. create() works: the tests' fixtures call it."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    @property
    def queues(self) -> "LimitsAlone":
        return self

    def create(self, queue: str) -> None:
        """Nothing is made."""

    def __getattr__(self, name: str) -> Any:
        raise Reached(name)


@dataclass
class Sentence:
    """A test of the contract. skips, defects: reasons by service. runs: where at least a part of it must pass."""

    text: str
    skips: dict[str, str] = field(default_factory=dict)
    defects: dict[str, str] = field(default_factory=dict)
    runs: set[str] = field(default_factory=set)


class Declarations:
    """A plugin of pytest that fills `sentences`: by test, in the order in which they are written."""

    def __init__(self) -> None:
        self.sentences: dict[str, Sentence] = {}
        self._tests: dict[str, tuple[str, str]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for plugin in session.config.pluginmanager.get_plugins():
            if (services := getattr(plugin, "SERVICES", None)) and services.keys() == COLUMNS.keys():
                services.update({name: _alone(limits) for name, (_, limits) in COLUMNS.items()})
        for item in sorted(session.items, key=lambda item: item.location[:2]):
            test = f"{item.location[0]}::{item.originalname}"
            self._tests[item.nodeid] = test, item.callspec.params["service"]
            text = item.originalname.removeprefix("test_").replace("_", " ")
            self.sentences.setdefault(test, Sentence(text))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.when == "setup" and report.passed):
            return
        test, service = self._tests[report.nodeid]
        sentence = self.sentences[test]
        if hasattr(report, "wasxfail"):
            sentence.defects[service] = report.wasxfail
        elif report.skipped:
            sentence.skips[service] = report.longrepr[2].removeprefix("Skipped: the service ")
        else:
            sentence.runs.add(service)


def _alone(limits: Limits) -> Any:
    @contextmanager
    def opened(_: Path) -> Iterator[LimitsAlone]:
        yield LimitsAlone(limits)

    return opened


def declared() -> list[Sentence]:
    """The sentences of the contract, in order, with what the services have to do with each."""
    found = Declarations()
    options = ["-p", "no:cacheprovider", "-n", "0", "-q", "-q", "--tb=no", "-rN", "--no-summary", f"--rootdir={ROOT}"]
    code = pytest.main([*options, str(ROOT / "tests" / "contract")], plugins=[found])
    if code is not pytest.ExitCode.TESTS_FAILED:  # each fails at its first operation
        raise RuntimeError(f"the contract's tests could not be looked at: pytest ended with {code!r}")
    return list(found.sentences.values())


def contract_table(sentences: list[Sentence]) -> str:
    """The sentences that do not hold everywhere, and what the letters and defects in the cells mean."""
    letters: dict[str, str] = {}
    rows: dict[str, list[str]] = {}
    defects: dict[str, str] = {}
    for each in sentences:
        if each.skips or each.defects:
            cells = " | ".join(_cell(each, service, letters) for service in COLUMNS)
            rows.setdefault(cells, []).append(each.text)
            defects |= dict(reason.split(": ", 1) for reason in each.defects.values())
    same = len(sentences) - sum(map(len, rows.values()))
    heads = " | ".join(head for head, _ in COLUMNS.values())
    return "\n".join(
        [
            f"The contract has {len(sentences)} sentences; {same} of them hold on every service. The others:",
            "",
            f"| the contract says | {heads} |",
            "| --- " * (len(COLUMNS) + 1) + "|",
            *(f"| {'<br>'.join(texts)} | {cells} |" for cells, texts in rows.items()),
            "",
            "A letter: the sentence is not asked of a service that ...",
            "",
            *(f"- **{letter}** {reason}" for reason, letter in letters.items()),
            "",
            "X...: a defect of the service's own. The suite expects it to show, and fails once it is mended:",
            "",
            *(f"- **{name}** {what}" for name, what in sorted(defects.items(), key=lambda one: _natural(one[0]))),
            "",
        ]
    )


def _natural(name: str) -> tuple[str, int]:
    letters, number = re.fullmatch(r"([A-Z]+)(\d+)", name).groups()  # type: ignore[union-attr]
    return letters, int(number)


def _cell(sentence: Sentence, service: str, letters: dict[str, str]) -> str:
    """letters: by reason; those that are new get the next one."""
    if service in sentence.defects:
        return f"**{sentence.defects[service].split(':')[0]}**"
    if service in sentence.skips:
        letter = letters.setdefault(sentence.skips[service], chr(ord("a") + len(letters)))
        return f"in part: {letter}" if service in sentence.runs else letter
    return "yes"


def written() -> str:
    """docs/services.md with its generated parts as they should be. Runs pytest: not from within a test's process."""
    text = readme.replaced(PAGE.read_text(), "limits", readme.service_table())
    return readme.replaced(text, "contract", contract_table(declared()))


if __name__ == "__main__":
    page = written()
    if sys.argv[1:] == ["--check"]:
        sys.exit(page != PAGE.read_text() and "docs/services.md: run `make readme`")
    PAGE.write_text(page)
