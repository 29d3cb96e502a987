"""README, docs/ and the other pages: their links lead somewhere."""

import re
from pathlib import Path

import pytest
from support import HERE

PAGES = [*HERE.glob("*.md"), *HERE.glob("docs/*.md")]


def anchors(page: Path) -> set[str]:
    """Where a link into that page may lead: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    for path, anchor in links:
        there = page.parent / path if path else page
        assert there.exists(), path
        assert not anchor or anchor in anchors(there), f"{path}#{anchor}"
