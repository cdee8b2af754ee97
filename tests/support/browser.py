"""A real browser without a window: chromium by its driver, spoken to by WebDriver over plain HTTP.

    https://www.w3.org/TR/webdriver2/

Nothing but the standard library. `Browser.until` waits inside the browser, for what a page becomes.
"""

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

from tests.conftest import NOT_RUN

PATIENCE_S = 60.0  # for one thing to become so; far more than it takes on a busy machine
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # as the standard calls it
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
    "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-extensions", "--force-device-scale-factor=1",
)  # fmt: skip
UNTIL = """
const [text, patience, done] = arguments;
const check = new Function(`return (${text})`);
const end = performance.now() + patience;
(function look() {
  let found = false;
  try { found = check(); } catch (error) { found = false; }
  if (found) return done({ found, at: Date.now() / 1000 });
  if (performance.now() > end) return done(null);
  setTimeout(look, 25);
})();
"""


def is_installed() -> bool:
    """Whether there is a browser with its driver."""
    return shutil.which("chromedriver") is not None and shutil.which("chromium") is not None


needs_browser = pytest.mark.skipif(
    not is_installed(),
    reason=f"{NOT_RUN}: the live page in a browser: install chromium and chromium-driver",
)


@dataclass
class Browser:
    """One window. Use as a context.

    Attributes
    ----------
    width, height : int
        Of the window, pixels.
    is_dark : bool
        Whether the person who sits there likes it dark.
    """

    width: int = 1280
    height: int = 900
    is_dark: bool = False
    _session: str = field(default="", init=False)

    def __enter__(self) -> Self:
        self._home = tempfile.mkdtemp(prefix="treefold-browser-")
        self._log = Path(self._home, "driver.log").open("w+b")
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
            env={**os.environ, "HOME": self._home},
        )
        try:
            self._base = f"http://127.0.0.1:{self._port()}"
            size = f"--window-size={self.width},{self.height}"
            own = ["--user-data-dir=" + str(Path(self._home, "profile")), size]
            options = {"args": [*FLAGS, *own], "binary": shutil.which("chromium")}
            wanted = {
                "goog:chromeOptions": options,
                "goog:loggingPrefs": {"browser": "ALL"},
                "timeouts": {"script": int(2000 * PATIENCE_S)},
            }
            asked = {"capabilities": {"alwaysMatch": wanted}}
            self._session = f"/session/{self._ask('POST', '/session', asked)['sessionId']}"
            if self.is_dark:
                self.command("Emulation.setEmulatedMedia", {"features": [
                    {"name": "prefers-color-scheme", "value": "dark"},
                ]})  # fmt: skip
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self._session:
                self._ask("DELETE", self._session)
        finally:
            self._driver.terminate()
            self._driver.communicate()
            self._log.close()
            shutil.rmtree(self._home, ignore_errors=True)

    def open(self, link: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._ask("POST", f"{self._session}/url", {"url": link})

    def run(self, script: str, *arguments: object) -> Any:  # whatever the script returns
        """Run a piece of JavaScript in the page; what it returns."""
        body = {"script": script, "args": list(arguments)}
        return self._ask("POST", f"{self._session}/execute/sync", body)

    def until(self, what: str) -> float:
        """Wait until an expression of JavaScript is true; says when it was (Unix s)."""
        body = {"script": UNTIL, "args": [what, 1000 * PATIENCE_S]}
        found = self._ask("POST", f"{self._session}/execute/async", body)
        assert found is not None, f"not so after {PATIENCE_S} s: {what}\n{self.text()}"
        return float(found["at"])

    def text(self) -> str:
        """What a person could read."""
        return str(self.run("return document.body.innerText"))

    def click(self, selector: str) -> None:
        """Click on what a CSS selector finds first, as a person would: it has to be in sight."""
        body = {"using": "css selector", "value": selector}
        found = self._ask("POST", f"{self._session}/element", body)
        self._ask("POST", f"{self._session}/element/{found[ELEMENT]}/click", {})

    def console(self) -> list[str]:
        """What the browser complained of since the last time."""
        body = {"type": "browser"}
        lines = self._ask("POST", f"{self._session}/se/log", body)
        return [line["message"] for line in lines if line["level"] in ("SEVERE", "WARNING")]

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self._ask("GET", f"{self._session}/screenshot"))

    def command(self, name: str, parameters: dict[str, object]) -> Any:  # as the protocol has it
        """A command of the DevTools protocol."""
        body = {"cmd": name, "params": parameters}
        return self._ask("POST", f"{self._session}/goog/cdp/execute", body)

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            found = re.search(rb"started successfully on port (\d+)", line)
            if found:
                return int(found[1])
        raise AssertionError("the driver of the browser does not start")

    def _ask(self, method: str, path: str, body: object = None) -> Any:  # any JSON
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        url = self._base + path
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310 # http
        try:
            with urllib.request.urlopen(request, timeout=3 * PATIENCE_S) as answer:  # noqa: S310 # as above
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            error.close()
            raise AssertionError(f"{method} {path}: {text}") from None


def main() -> None:
    """Take a picture of a page: ``python -m tests.support.browser LINK FILE WIDTH HEIGHT [dark]``.

    After the file may follow what has to be true before, as an expression of JavaScript.
    """
    link, file, width, height, *rest = sys.argv[1:]
    with Browser(int(width), int(height), is_dark="dark" in rest) as browser:
        browser.open(link)
        for what in rest:
            if what != "dark":
                browser.until(what)
        Path(file).write_bytes(browser.screenshot())
        sys.stdout.write("".join(f"{line}\n" for line in browser.console()))


if __name__ == "__main__":
    main()
