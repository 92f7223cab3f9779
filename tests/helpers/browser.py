"""Chromium, driven by its WebDriver: what a test of a page needs of https://www.w3.org/TR/webdriver2/, and no more."""

import json
import shutil
import subprocess
import time
import urllib.request
from contextlib import contextmanager

BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
OPTIONS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", 
           "--disable-background-networking", "--force-device-scale-factor=1", "--window-size=1200,900")  # fmt: skip
KEYS = {"ArrowRight": "\ue014", "ArrowLeft": "\ue012", "Escape": "\ue00c", "Enter": "\ue007", "Tab": "\ue004"}


def find(names):
    """The first of some programs that there is, or None."""
    return next(filter(None, map(shutil.which, names)), None)


def missing():
    """Which program there is not; "" where a browser can be driven."""
    return "" if find(DRIVERS) and find(BROWSERS) else "no chromium and chromedriver (Debian: chromium-driver)"


class Browser:
    """A session of a driver that listens at `url`."""

    def __init__(self, url):
        options = {"binary": find(BROWSERS), "args": list(OPTIONS)}
        match = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        asked = {"capabilities": {"alwaysMatch": match}}
        self.session = f"{url}/session"
        self.session += "/" + self.ask("POST", "", asked)["sessionId"]

    def ask(self, method, path, body=None):
        """The value that the driver answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.session + path, data, {"Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]

    def open(self, url):
        self.ask("POST", "/url", {"url": url})

    def run(self, script, *arguments):
        """What a script returns, which may be a promise's value."""
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def wait(self, script, *arguments, seconds=60):
        """Until a script returns something true, which is returned."""
        until = time.monotonic() + seconds
        while not (value := self.run(script, *arguments)):
            assert time.monotonic() < until, f"not within {seconds} s: {script}"
            time.sleep(0.05)
        return value

    def press(self, *keys):
        """Keys, one after the other, for what has the focus; see KEYS for those with names."""
        codes = [KEYS.get(key, key) for key in keys]
        actions = [{"type": kind, "value": code} for code in codes for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def click(self, selector):
        """The first element of a CSS selector, with the mouse."""
        found = self.ask("POST", "/element", {"using": "css selector", "value": selector})
        self.ask("POST", f"/element/{next(iter(found.values()))}/click", {})

    def errors(self):
        """What the page's console has of errors since the last look."""
        entries = self.ask("POST", "/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]


@contextmanager
def browser():
    """A fresh one, on a driver of its own at a free port of this machine."""
    driver = subprocess.Popen([find(DRIVERS), "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        line = next(line for line in driver.stdout if "successfully on port" in line)
        opened = Browser(f"http://127.0.0.1:{line.rsplit(' ', 1)[1].strip().rstrip('.')}")
        try:
            yield opened
        finally:
            opened.ask("DELETE", "")
    finally:
        driver.terminate()
        driver.wait(20)
