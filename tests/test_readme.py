"""README and docs/ cannot lie: their tables are the code's own, what they link to is there, and README stays short."""

import re
from pathlib import Path

import pytest
import readme
from support import HERE

import claim_queues.__main__

PAGES = [readme.README, *sorted((HERE / "docs").glob("*.md"))]
DEVELOPMENT = HERE / "docs" / "development.md"
MOST_LINES = 260


def test_readme_is_read_in_one_sitting() -> None:
    assert len(readme.README.read_text().splitlines()) <= MOST_LINES


def test_the_generated_tables_are_what_the_code_says() -> None:
    assert readme.written() == readme.README.read_text(), "run `make readme`"
    assert readme.written_options() == readme.OPTIONS.read_text(), "run `make readme`"


@pytest.mark.parametrize("command", ["peek", "dead-letters", "redrive"])
def test_the_columns_of_the_tool_are_documented(command: str) -> None:
    (columns,) = re.findall(r": ([A-Z_]+ [A-Z_ ]+)\.", claim_queues.__main__.cli.commands[command].help or "")
    assert f"prints `{columns}`" in " ".join((HERE / "docs" / "operating.md").read_text().split())


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_make_targets_that_are_named_exist(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (HERE / "Makefile").read_text(), re.M)
    for named in re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.M):
        assert named in targets


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_relative_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text())
    assert [link for link in links if not _leads_somewhere(page, link)] == []


def _leads_somewhere(page: Path, link: str) -> bool:
    name, _, anchor = link.partition("#")
    target = page.parent / name if name else page
    if not anchor:
        return target.exists()
    headings = re.findall(r"^#+ (.*)", target.read_text(), re.M) if target.exists() else []
    return anchor in [re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def test_files_in_the_tree_exist() -> None:
    text = DEVELOPMENT.read_text()
    tree = text[text.rindex("```\nwidget_producer.py  widget") :]
    for line in tree.splitlines()[1:-1]:
        folder = "claim_queues" if line.startswith("  ") else ""
        for name in re.findall(r"[a-z_]+(?:\.py|/)", line.split("    ")[0] + "  "):
            assert (HERE / folder / name).exists(), name
