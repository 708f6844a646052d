"""The site in a browser: every page opens, on a desk and on a phone, and every link leads somewhere.

Run by `pytest -m browser`, with Chromium and its driver on the machine; no part of CI.
"""

import functools
import http.server
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

DOCS = Path(__file__).parents[1] / "docs"
SCREENS = {"desk": (1280, 900), "phone": (390, 844)}
THEMES = "light", "dark"
pytestmark = pytest.mark.browser


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The address of the site, freshly built."""
    folder = tmp_path_factory.mktemp("site")
    subprocess.run([sys.executable, "-m", "sphinx", "-W", "-n", "-q", DOCS, folder], check=True)
    server = http.server.ThreadingHTTPServer(("localhost", 0), functools.partial(Handler, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://localhost:{server.server_port}/"
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
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{word}")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(site, browser):
    """The address of each page that links lead to from the first, with the ids on it and the links that it has."""
    found, waiting = {}, [site + "index.html"]
    while waiting:
        page = waiting.pop()
        browser.get(page)
        links = browser.execute_script("return [...document.querySelectorAll('a[href]')].map(a => a.href)")
        ids = browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
        found[page] = set(ids), {link for link in links if link.startswith(site)}
        for link in found[page][1]:
            address = urldefrag(link).url
            if address.endswith(".html") and address not in found and address not in waiting:
                waiting.append(address)
    return found


def show(browser, screen, theme):
    """Make the browser a screen of that size and theme."""
    width, height = SCREENS[screen]
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": screen == "phone"}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    media = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def test_every_document_is_a_page(site, pages):
    names = {page.removeprefix(site) for page in pages}
    assert {f"{document.stem}.html" for document in DOCS.glob("*.md")} <= names


def test_every_internal_link_leads_to_a_page_and_a_place_on_it(site, pages):
    wrong = []
    for page, (_, links) in pages.items():
        for link in links:
            address, place = urldefrag(link)
            lost = place and address in pages and unquote(place) not in pages[address][0]
            exists = address in pages or address == site or "/_downloads/" in address
            if lost or not exists:
                wrong.append((page, link))
    assert wrong == []


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("theme", THEMES)
def test_every_page_is_quiet_its_own_and_no_wider_than_the_screen(site, browser, pages, screen, theme):
    show(browser, screen, theme)
    browser.get_log("browser")
    wrong = []
    for page in pages:
        browser.get(page)
        wrong += [entry["message"] for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
        asked = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
        wrong += [f"{page} asks for {name}" for name in asked if not name.startswith((site, "data:"))]
        width = browser.execute_script("return document.documentElement.scrollWidth")
        if width > SCREENS[screen][0]:
            wrong.append(f"{page} is {width} wide")
        broken = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
        wrong += [f"{page} shows no {source}" for source in browser.execute_script(broken)]
    assert wrong == []


def test_the_search_finds_what_is_there(site, browser):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(site + "search.html?q=ignore_index")
    found = WebDriverWait(browser, 10).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "ul.search li a"))
    assert any("targets.html" in link.get_attribute("href") for link in found)
