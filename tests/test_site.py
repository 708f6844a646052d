"""The site in a browser: every page shows itself, on a desk and on a phone, and every link leads somewhere.

Run by `pytest -m browser`, with Chromium and its driver on the machine; no part of CI.
"""

import functools
import http.server
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urldefrag

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SCREENS = {"desk": (1280, 900), "phone": (390, 844)}
THEMES = "light", "dark"
FIGURES = {"index": 1, "method": 4}  # on each page, one for each theme
pytestmark = pytest.mark.browser


class Site(NamedTuple):
    address: str
    folder: Path
    pages: list[str]
    failed: list[str]  # requests that found nothing


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass

    def send_error(self, code, *arguments):
        self.server.failed.append(f"{code} {self.path}")
        super().send_error(code, *arguments)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, freshly built and served."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-W", "-n", "-q", DOCS, folder], check=True)
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, directory=folder))
    server.failed = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = sorted(path.name for path in folder.glob("*.html"))
    yield Site(f"http://localhost:{server.server_port}/", folder, pages, server.failed)
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for word in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
        "host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",  # what is asked of another site fails, and is logged
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def show(browser, screen, theme):
    """Make the browser a screen of that size and theme."""
    width, height = SCREENS[screen]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def complaints(browser):
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def test_every_document_is_a_page(site):
    assert {f"{document.stem}.html" for document in DOCS.glob("*.md")} <= set(site.pages)


def test_every_internal_link_leads_to_a_file_and_a_place_in_it(site, browser):
    links, ids = {}, {}
    for page in site.pages:
        browser.get(site.address + page)
        links[page] = browser.execute_script("return [...document.querySelectorAll('a[href]')].map(a => a.href)")
        ids[page] = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
    wrong = []
    for page in site.pages:
        for link in links[page]:
            if link.startswith(site.address):
                address, place = (unquote(part) for part in urldefrag(link.removeprefix(site.address)))
                there = (site.folder / (address or "index.html")).is_file()
                if not there or (place and place not in ids[address]):
                    wrong.append((page, link))
    assert wrong == []
    assert sum(map(len, links.values())) > 10 * len(site.pages)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("theme", THEMES)
def test_every_page_is_quiet_and_complete_and_fits_the_screen(site, browser, screen, theme):
    show(browser, screen, theme)
    wrong = []
    for page in site.pages:
        browser.get(site.address + page)
        browser.execute_async_script(
            """
            const images = [...document.images].filter(image => image.getClientRects().length);
            images.forEach(image => image.loading = 'eager');
            Promise.allSettled(images.map(image => image.decode())).then(arguments[0]);
            """
        )
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        wrong += [f"{page} asks for {name}" for name in asked if not name.startswith((site.address, "data:"))]
        excess = browser.execute_script(
            """
            return [document.documentElement, document.querySelector('.content')]
                .map(part => Math.max(0, part.scrollWidth - part.clientWidth))
            """
        )
        wrong += [f"{page} is {pixels} pixels too wide" for pixels in excess if pixels]
        shown = browser.execute_script(
            "return [...document.images].filter(i => i.getClientRects().length).map(i => [i.src, i.naturalWidth])"
        )
        wrong += [f"{page} shows no {source}" for source, width in shown if not width]
        themes = [found.group(1) for source, _ in shown if (found := re.search(r"-(light|dark)\.svg$", source))]
        assert themes == [theme] * FIGURES.get(page.removesuffix(".html"), 0)
        wrong += [f"{page}: {message}" for message in complaints(browser)]
    assert wrong == []
    assert site.failed == []


def test_the_search_finds_what_is_there(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(site.address + "search.html?q=ignore_index")
    link = (By.CSS_SELECTOR, "ul.search li a[href*='targets.html']")  # results come one after the other
    assert WebDriverWait(browser, 10).until(lambda driver: driver.find_elements(*link))
    assert complaints(browser) == []
