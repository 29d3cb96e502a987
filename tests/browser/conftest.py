"""A real Chromium, and pages in it that tell what went wrong in them."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import axe_playwright_python
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM_OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
"""root's Chromium starts only without a sandbox."""
expect.set_options(timeout=30_000)
AXE = (Path(axe_playwright_python.__file__).parent / "axe.min.js").read_text()
SCREENSHOTS = Path(__file__).parent / "screenshots"
LISTEN = """
addEventListener("securitypolicyviolation", (event) => console.error("CSP:", event.violatedDirective));
"""


@dataclass
class Watched:
    """A page, what is wrong with it so far, and the URLs it asked for."""

    page: Page
    problems: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def assert_flawless(self) -> None:
        """No error, nothing asked for elsewhere, nothing wider than the window, nothing inaccessible."""
        origin = "/".join(self.page.url.split("/")[:3])
        assert self.problems == []
        self.page.evaluate(AXE)
        found = self.page.evaluate("axe.run()")["violations"]
        assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found] == []
        assert [asked for asked in self.requests if not asked.startswith(f"{origin}/")] == []
        assert self.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert "token" not in self.page.url

    def reached_by_tab(self) -> set[str]:
        """All that the tab key reaches, by id or text: each element once, with a focus that is seen."""
        reached = []
        for _ in range(self.page.locator("a:visible, input:visible, button:visible").count()):
            self.page.keyboard.press("Tab")
            focused = self.page.locator(":focus-visible")
            assert focused.evaluate("(element) => getComputedStyle(element).outlineStyle") == "solid"
            reached.append(focused.evaluate("(element) => element.id || element.textContent.trim()"))
        assert len(reached) == len(set(reached))
        return set(reached)

    def shoot(self, name: str) -> None:
        """See that the page is flawless in all its forms, with a screenshot of each."""
        SCREENSHOTS.mkdir(exist_ok=True)
        for width, scheme in product((375, 1280), ("light", "dark")):
            self.page.set_viewport_size({"width": width, "height": 900})
            self.page.emulate_media(color_scheme=scheme)
            self.page.screenshot(path=SCREENSHOTS / f"{name}-{width}-{scheme}.png", full_page=True)
            self.assert_flawless()


Open = Callable[..., Watched]


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
def open_page(browser: Browser) -> Iterator[Open]:
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
