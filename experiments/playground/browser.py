"""The page in a browser: for its test and its screenshots."""

import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, ConsoleMessage, Page, Request, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE = 120
"""Seconds after which what hangs is given up, on a busy machine too."""


def executable() -> str | None:
    """Where Chromium or Chrome is, if it is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def serving() -> Iterator[str]:
    """The address of a playground in a process of its own, on a free port."""
    command = [sys.executable, "-m", "experiments.playground", "--port", "0", "--no-show"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        # A server that hangs ends, so that reading its output does.
        watchdog = threading.Timer(PATIENCE, process.kill)
        watchdog.start()
        output = ""
        try:
            for line in process.stdout:
                output += line
                if found := re.search(r"http://\S+", line):
                    break
            else:
                raise RuntimeError(f"the playground did not start:\n{output}")
            watchdog.cancel()
            yield found[0]
        finally:
            watchdog.cancel()
            process.kill()


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable())
        yield browser
        browser.close()


def opened(browser: Browser, url: str, width: int, height: int) -> tuple[Page, list[str]]:
    """The page, drawn, and a list that fills with complaints: errors, requests elsewhere."""
    complaints: list[str] = []

    def on_request(request: Request) -> None:
        if not request.url.startswith((url, "data:", "blob:")):
            complaints.append(f"asked for {request.url}")

    def on_console(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            complaints.append(message.text)

    page = browser.new_page(viewport={"width": width, "height": height})
    page.set_default_timeout(PATIENCE * 1000)
    page.on("request", on_request)
    page.on("console", on_console)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(url)
    page.wait_for_function("window.Bokeh?.documents[0]?.is_idle")
    return page, complaints
