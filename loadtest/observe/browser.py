"""A headless Chromium that is controlled through its DevTools pipe: it opens and inspects a page like a reader."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which root cannot have
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    "--no-first-run",
    "--disable-quic",
    "--disable-background-networking",  # with the next two: a test asks nobody but the page
    "--disable-component-update",
    "--disable-sync",
)
TROUBLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


class Browser:
    """One page. `said` collects every exception, console message and log entry, a refusal by the policy among them.

    `requested` collects the address of every request that the page makes, a refused one too.
    """

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("the browser has no pipe to be asked through")
        self.said: list[dict[str, Any]] = []
        self.requested: list[str] = []
        self.received = 0  #: bytes of answers as they came over the network, headers too
        self._commands, self._answers = process.stdin, process.stdout
        self._last = 0
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = {"sessionId": attached["sessionId"]}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """A DevTools command's result."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params, **self._session}
        self._commands.write(json.dumps(message).encode() + b"\0")
        self._commands.flush()
        while (answer := self._next()).get("id") != self._last:
            pass
        if "error" in answer:
            raise RuntimeError(f"the browser refused {method}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path | str, width: int = 1280, scheme: str = "light") -> None:
        """Show a file or a URL in a window of so many CSS pixels, for a reader who prefers light or dark."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.prefer(scheme)
        self.call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        while self._next().get("method") != "Page.loadEventFired":
            pass
        self.value("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def prefer(self, scheme: str) -> None:
        """What `prefers-color-scheme` is from now on."""
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def value(self, expression: str) -> Any:
        """What a JavaScript expression or promise comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"the page failed: {found['exceptionDetails']}")
        return found["result"].get("value")

    def point(self, place: str) -> None:
        """Move the pointer to the [x, y] that a JavaScript expression gives."""
        x, y = self.value(place)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def close(self) -> None:
        """End the browser."""
        self._session = {}
        self.call("Browser.close")

    def _next(self) -> dict[str, Any]:
        raw = bytearray()
        while (byte := self._answers.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser ended")
            raw += byte
        message: dict[str, Any] = json.loads(raw)
        if message.get("method") in TROUBLE:
            self.said.append(message["params"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requested.append(message["params"]["request"]["url"])
        elif message.get("method") == "Network.loadingFinished":
            self.received += round(message["params"]["encodedDataLength"])
        return message


@contextmanager
def open_browser(home: Path) -> Iterator[Browser]:
    """A browser with an empty profile under `home`, ended with the block. Raises RuntimeError if there is none."""
    if CHROMIUM is None:
        raise RuntimeError("there is no chromium, chromium-browser or google-chrome on the PATH")
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'exec "$0" "$@" 3<&0 4>&1', CHROMIUM, *FLAGS, f"--user-data-dir={home}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "HOME": str(home)},
    )
    with process:
        try:
            page = Browser(process)
            yield page
            page.close()
        except BaseException:
            process.kill()
            raise
