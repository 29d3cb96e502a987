"""A real Chromium, and pages in it that tell what went wrong in them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
"""root's Chromium starts only without a sandbox."""
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
LISTEN = """
addEventListener("securitypolicyviolation", (event) => console.error("CSP:", event.violatedDirective));
"""


@dataclass
class Watched:
    """A page, what is wrong with it so far, and the URLs it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def inaccessible(self) -> list[tuple[str, Any]]:
        """What axe-core finds wrong: the rule and the elements."""
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run()")
        return [(one["id"], [node["target"] for node in one["nodes"]]) for one in found["violations"]]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not path:
        pytest.skip("Chromium is missing: `make browser` installs it")
    home = str(tmp_path_factory.mktemp("chromium"))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=CHROMIUM_OPTIONS, env={"HOME": home})
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Watched]]:
    """Opens a page in a context of its own, made with the options given."""
    with ExitStack() as stack:
        yield partial(_open, browser, stack)


def _open(browser: Browser, stack: ExitStack, url: str, **options: Any) -> Watched:
    context = browser.new_context(**options)
    stack.callback(context.close)
    watched = Watched(context.new_page())
    page = watched.page
    page.add_init_script(LISTEN)
    page.on("console", lambda message: watched.problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: watched.problems.append(str(error)))
    page.on("dialog", lambda dialog: (watched.problems.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: watched.requests.append(request.url))
    page.goto(url)
    return watched
