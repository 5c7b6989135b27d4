"""Chromium without a window, spoken to through two pipes: no driver and no package is needed."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# What goes wrong in a page, as Chromium tells it.
_PROBLEMS = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded", "Network.requestWillBeSent")


class Browser:
    """One page. `problems`: what it wrote to the console, and what it asked the network for."""

    def __init__(self, reading: Any, writing: Any) -> None:
        self._reading, self._writing = reading, writing
        self._number = 0
        self._session: str | None = None
        self.problems: list[str] = []
        self._loaded = False
        target = self._ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._ask(f"{domain}.enable")

    def open(self, path: Path, width: int, height: int, *, dark: bool = False, paper: bool = False) -> None:
        """As a screen of that size shows it; a narrow one is a phone's."""
        phone = width < 500
        self._ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._ask("Emulation.setEmulatedMedia", media="print" if paper else "", features=[scheme])
        self._loaded = False
        self._ask("Page.navigate", url=path.as_uri())
        while not self._loaded:
            self._heed(self._message())
        # Two frames: observers of sizes have told what they saw.
        self.run("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        found = self._ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def shoot(self, path: Path, *, whole: bool = False) -> None:
        image = self._ask("Page.captureScreenshot", captureBeyondViewport=whole, **self._whole() if whole else {})
        path.write_bytes(base64.b64decode(image["data"]))

    def _whole(self) -> dict[str, Any]:
        size = self._ask("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}}

    def print(self, path: Path) -> None:
        pdf = self._ask("Page.printToPDF", preferCSSPageSize=True, printBackground=True)
        path.write_bytes(base64.b64decode(pdf["data"]))

    def _ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._writing.write(json.dumps(message).encode() + b"\0")
        self._writing.flush()
        while True:
            answer = self._message()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]  # type: ignore[no-any-return]
            self._heed(answer)

    def _message(self) -> dict[str, Any]:
        text = b"".join(iter(lambda: self._reading.read(1), b"\0"))
        return json.loads(text)  # type: ignore[no-any-return]

    def _heed(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        self._loaded = self._loaded or method == "Page.loadEventFired"
        url = params.get("request", {}).get("url", "")
        if method in _PROBLEMS and not url.startswith(("file:", "data:")):
            self.problems.append(json.dumps(params)[:2000])


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """`folder`: for what Chromium keeps."""
    assert CHROMIUM is not None, "REQUIRE_CHROMIUM is set, and there is none"
    to_read, to_write = os.pipe(), os.pipe()

    def as_three_and_four() -> None:
        # High ones first: 3 or 4 may be one of ours.
        high = [os.dup2(number, 50 + place) for place, number in enumerate((to_read[0], to_write[1]))]
        for place, number in enumerate(high):
            os.dup2(number, 3 + place)

    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run",
             "--disable-background-networking", f"--user-data-dir={folder / 'profile'}")  # fmt: skip
    with subprocess.Popen(
        [CHROMIUM, *flags], preexec_fn=as_three_and_four, close_fds=False, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        os.close(to_read[0])
        os.close(to_write[1])
        with os.fdopen(to_write[0], "rb") as reading, os.fdopen(to_read[1], "wb") as writing:
            try:
                yield Browser(reading, writing)
            finally:
                process.kill()
