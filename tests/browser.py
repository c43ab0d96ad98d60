"""Chromium: a page as it is after a while, and a page that stays open, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def command(profile: Path, *options: str) -> list[str]:
    assert CHROMIUM is not None
    return [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", *options]


def browse(file: Path, *options: str) -> tuple[str, list[str]]:
    """The DOM of a page once it has settled, and what it wrote to its console."""
    shown = (
        "--enable-logging=stderr",
        "--virtual-time-budget=3000",
        "--dump-dom",
        *options,
        f"file://{file}",
    )
    done = subprocess.run(
        command(file.parent / "profile", *shown), capture_output=True, text=True, timeout=180, check=True
    )
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


class Tab:
    """A page that is open in a browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket, self.sent = socket, 0

    async def value(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page; None while it loads."""
        self.sent += 1
        parameters = {"expression": expression, "returnByValue": True}
        await self.socket.send_json({"id": self.sent, "method": "Runtime.evaluate", "params": parameters})
        while (answer := await self.socket.receive_json(timeout=60)).get("id") != self.sent:
            pass
        return answer.get("result", {}).get("result", {}).get("value")

    async def wait_for(self, expression: str, seconds: float = 120.0) -> None:
        """Wait until an expression is true."""
        end = time.monotonic() + seconds
        while not await self.value(expression):
            assert time.monotonic() < end, (
                f"never true: {expression}; the page: {await self.value('document.body.innerText')}"
            )
            await asyncio.sleep(0.2)


@contextlib.asynccontextmanager
async def opened(file: Path, profile: Path) -> AsyncIterator[Tab]:
    """A page that is open until the context ends."""
    browser = subprocess.Popen(
        command(profile, "--remote-debugging-port=0", f"file://{file}"), stderr=subprocess.DEVNULL
    )
    try:
        where = profile / "DevToolsActivePort"
        for _ in range(600):
            if where.is_file() and len(where.read_text().splitlines()) == 2:
                break
            await asyncio.sleep(0.1)
        port = where.read_text().splitlines()[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as listed:
                pages = [page for page in json.loads(await listed.text()) if page["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Tab(socket)
    finally:
        browser.terminate()
        browser.wait(60)
