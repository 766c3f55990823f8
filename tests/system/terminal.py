"""`baton …` at a terminal of its own: what it shows, what is typed, Ctrl-C and Ctrl-D included."""

from __future__ import annotations

import asyncio
import codecs
import os
import pty
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.system.harness import ROOT

CTRL_C, CTRL_D = "\x03", "\x04"
# The terminal becomes the process's own, so that its Ctrl-C is a signal to the process.
_LOGIN = (
    "import os, sys; os.login_tty(0); os.execv(sys.executable, [sys.executable, '-m', 'baton.cli.main', *sys.argv[1:]])"
)


class Terminal:
    def __init__(self, process: asyncio.subprocess.Process, descriptor: int) -> None:
        self.process = process
        self.shown = ""
        """All of it, so far."""
        self._seen = 0
        self._descriptor = descriptor
        self._text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end in the midst of a character
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(descriptor, self._read)

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    async def until(self, text: str, seconds: float = 60.0) -> str:
        """What is shown from where the last call stopped, up to and with `text`."""
        try:
            async with asyncio.timeout(seconds):
                while (found := self.shown.find(text, self._seen)) < 0:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{text!r} was not shown; this was:\n{self.shown[self._seen :]}") from None
        begin, self._seen = self._seen, found + len(text)
        return self.shown[begin : self._seen]

    async def ended(self) -> int:
        return await asyncio.wait_for(self.process.wait(), 30)

    def _read(self) -> None:
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # the process is gone, and its side of the terminal with it
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        self._text += self._decoder.decode(data, final=not data)
        self.shown = self._text.replace("\r\n", "\n")
        self._changed.set()


@asynccontextmanager
async def terminal(*arguments: str) -> AsyncIterator[Terminal]:
    ours, theirs = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _LOGIN, *arguments,
        stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=os.environ | {"TERM": "dumb"},
    )  # fmt: skip
    os.close(theirs)
    shown = Terminal(process, ours)
    try:
        yield shown
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        asyncio.get_running_loop().remove_reader(ours)
        os.close(ours)
