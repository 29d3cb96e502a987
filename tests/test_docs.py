"""The pages in docs/ cannot rot: links lead somewhere, named code exists, generated parts and sums are right."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import HERE

PAGES = sorted((HERE / "docs").glob("*.md"))
ids = {"ids": [page.name for page in PAGES]}
CODE = re.compile(r"`([\w/]+\.py): ([\w.]+)`")


def anchors(page: Path) -> set[str]:
    """What `#...` can name there, as GitHub makes it from the headings."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, **ids)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, **ids)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:tests|bench|deploy|claim_queues|docs)/[\w./-]+)`", page.read_text()):
        assert (HERE / name).exists(), name


def defined(path: Path) -> set[str]:
    """Names of a module's classes, functions and values, and of a class's, as `Class.name`."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        found.update(_names(node))
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for inner in node.body for name in _names(inner)}
    return found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


@pytest.mark.parametrize("page", PAGES, **ids)
def test_code_that_is_named_exists(page: Path) -> None:
    for module, name in CODE.findall(page.read_text()):
        assert name in defined(HERE / module), f"{module}: {name}"


def test_every_step_of_a_message_is_named_in_the_code() -> None:
    section = (HERE / "docs" / "how-it-works.md").read_text().partition("## Where it is in the code")[2]
    rows = [line for line in section.splitlines() if line.startswith("| ")][2:]
    assert len(rows) > 20
    assert [row for row in rows if not CODE.search(row)] == []


def test_the_generated_parts_of_services_are_the_codes_own() -> None:
    done = subprocess.run(
        [sys.executable, HERE / "tests" / "services_page.py", "--check"],
        check=False, capture_output=True, text=True, cwd=HERE, env={"PYTHONPATH": f"{HERE}:{HERE / 'tests'}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def tables() -> list[list[list[str]]]:
    """Those of docs/scaling.md: rows of cells."""
    blocks = re.findall(r"(?:^\|.*\n)+", (HERE / "docs" / "scaling.md").read_text(), re.M)
    return [
        [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()] for block in blocks
    ]


def number(text: str) -> float:
    return float(re.sub(r"[^\d.]", "", text.partition(":")[0].partition(" ")[0]))


POST_S, REQUEST_S, MONTH_S, FREE, PER_REQUEST = 0.02, 0.01, 2_592_000, 1_000_000, 0.40e-6
IN_BULK = (0.1, 0.1, 0.01)


def test_the_sums_of_scaling_are_right() -> None:
    costs, needs = tables()
    per = {row[0][0]: row[1:] for row in costs[2:]}
    checked = 0
    for rate, what, *cells in needs[2:]:
        for service, cell in enumerate(cells[:3]):
            if not cell:
                continue
            b, c, s, d, w, i, cpu, service_cpu = (number(per[name][service] or "0") for name in "bcsdwiuv")
            r = number(rate)
            n = max(2, math.ceil(round(max(r * cpu / 0.7e6, r * s * REQUEST_S), 6)))
            full = r * (c + IN_BULK[service])
            alone = r * (d / min(b, max(1, r * REQUEST_S / n)) + 1) + n * w
            q = {"a": full, "o": alone, "i": n * i}.get(what[-1], 0)
            if what == "consumers x slots":
                slots = int(cell.partition(" x ")[2])
                assert n * slots >= r * POST_S / 0.7, (rate, cell)
                wanted: float = n
            elif what.startswith("requests/s"):
                wanted = q
            elif cell.endswith("USD"):
                wanted = (q * MONTH_S - FREE) * PER_REQUEST
            elif cell.endswith("requests"):
                wanted = q * MONTH_S
            else:
                wanted = r * service_cpu / 1e6
            within = 0.02 if cell.endswith("cores") else 1e-3
            assert number(cell) == pytest.approx(wanted, rel=within), (rate, what, cell)
            checked += 1
    assert checked > 25
