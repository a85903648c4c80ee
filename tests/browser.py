"""A real browser for tests: headless Chromium, driven through its debugging pipe with the standard library alone.

Debian's package is chromium-headless-shell (.ci/run installs it). Commands and events are those of
https://chromedevtools.github.io/devtools-protocol.
"""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = ("--headless", "--remote-debugging-pipe", "--disable-gpu", "--hide-scrollbars", "--no-first-run")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic")
# The browser reads from descriptor 3 and writes to 4, whatever numbers the pipes have; a shell may know only one digit.
AS_3_AND_4 = """
import fcntl, os, sys
theirs_out = fcntl.fcntl(int(sys.argv[2]), fcntl.F_DUPFD, 10)
os.dup2(int(sys.argv[1]), 3)
os.dup2(theirs_out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
PATIENCE = 60  # seconds for one answer on a busy machine
KEYS = {"ArrowLeft": 37, "ArrowRight": 39, "ArrowDown": 40, "Home": 36, "End": 35, "Tab": 9, "Enter": 13}


def find_browser() -> str | None:
    """The program's path, or None if there is none here."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Tab:
    """One page in the browser, and all it has said since it was opened.

    requests: addresses asked for, data: left out; complaints: console messages, exceptions and refusals by policy
    """

    def __init__(self, pipe: "_Pipe", session: str, scripted: bool) -> None:
        self._pipe, self._session = pipe, session
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._loaded = False
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScriptExecutionDisabled", value=not scripted)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        return self._pipe.call(method, params, self._session, self._note)

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent" and not params["request"]["url"].startswith("data:"):
            self.requests.append(params["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(params["args"]))
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(params["exceptionDetails"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, address: str) -> None:
        """Load a page, and wait until it and its pictures are there."""
        self._loaded = False
        self.call("Page.navigate", url=address)
        while not self._loaded:
            self._pipe.receive(self._note)

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is, as JSON has it; a promise is waited for."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def resize(self, width: int, height: int) -> None:
        """The window's size, CSS pixels."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, media: str = "", scheme: str = "light") -> None:
        """media: 'print', or '' for the screen; scheme: 'light' or 'dark'."""
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.call("Emulation.setEmulatedMedia", media=media, features=features)

    def press(self, key: str) -> None:
        """One key of KEYS, to whatever has the focus."""
        described = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **described, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **described)

    def drag(self, *points: tuple[float, float]) -> None:
        """Press the mouse at the first point, move over the others, let go at the last; CSS pixels of the window."""
        for kind, (x, y) in [("mousePressed", points[0]), *[("mouseMoved", point) for point in points[1:]]]:
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=1)
        x, y = points[-1]
        self.call("Input.dispatchMouseEvent", type="mouseReleased", x=x, y=y, button="left", clickCount=1)

    def click(self, selector: str) -> None:
        """In the middle of the first such element, scrolled into view."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.value(f"{place}.scrollIntoView({{block: 'center'}})")
        box = self.value(f"{place}.getBoundingClientRect().toJSON()")
        self.drag((box["x"] + box["width"] / 2, box["y"] + box["height"] / 2))

    def accessible(self) -> list[tuple[str, str]]:
        """What a screen reader is told: role and name of every node that is not ignored, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        told = [node for node in nodes if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in told]

    def screenshot(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self, path: Path) -> None:
        """The page as it is printed."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", printBackground=True)["data"]))


class Browser:
    def __init__(self, pipe: "_Pipe") -> None:
        self._pipe = pipe

    @contextmanager
    def tab(self, scripted: bool = True) -> Iterator[Tab]:
        """A new page, closed afterwards. scripted: False as where a person has turned JavaScript off."""
        target = self._pipe.call("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self._pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        yield Tab(self._pipe, session, scripted)
        self._pipe.call("Target.closeTarget", {"targetId": target})


@contextmanager
def running_browser(program: str) -> Iterator[Browser]:
    """Start the browser with a profile of its own, and end it."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    flags = [*FLAGS, *(["--no-sandbox"] if os.geteuid() == 0 else [])]  # Chromium's sandbox refuses root
    start = [sys.executable, "-c", AS_3_AND_4, str(theirs_in), str(theirs_out), program, *flags]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, open(os.devnull, "wb") as nowhere:
        child = subprocess.Popen(
            [*start, f"--user-data-dir={profile}"], pass_fds=(theirs_in, theirs_out), stdout=nowhere, stderr=nowhere
        )
        os.close(theirs_in)
        os.close(theirs_out)
        pipe = _Pipe(ours_in, ours_out)
        try:
            yield Browser(pipe)
            pipe.call("Browser.close", {})
            child.wait(PATIENCE)
        finally:
            child.kill()
            child.wait()
            os.close(ours_in)
            os.close(ours_out)


class _Pipe:
    """Messages in JSON, each ended by a zero byte."""

    def __init__(self, read_from: int, write_to: int) -> None:
        self._read_from, self._write_to = read_from, write_to
        self._rest = b""
        self._number = 0

    def call(self, method: str, params: dict[str, Any], session: str | None = None, note: Any = None) -> dict[str, Any]:
        """Send a command, and wait for its answer; events meanwhile go to `note`. Raises: AssertionError if refused."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        data = json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0"
        while data:
            data = data[os.write(self._write_to, data) :]
        while (answer := self.receive(note)).get("id") != self._number:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def receive(self, note: Any = None) -> dict[str, Any]:
        """The next message. Raises: TimeoutError, EOFError"""
        begin = time.monotonic()
        while b"\0" not in self._rest:
            if not select.select([self._read_from], [], [], max(0.0, begin + PATIENCE - time.monotonic()))[0]:
                raise TimeoutError(f"the browser said nothing for {PATIENCE} seconds")
            data = os.read(self._read_from, 1 << 20)
            if not data:
                raise EOFError("the browser ended; is a library missing? run it by hand with --headless --dump-dom")
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        if note is not None and "method" in message:
            note(message["method"], message["params"])
        return message
