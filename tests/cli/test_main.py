"""`baton COMMAND …`, apart from what the commands do."""

from __future__ import annotations

import io
import sys

import pytest

from baton.cli.main import COMMANDS, main


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", b"Gr??e\n"), ("utf-8", "Größe\n".encode())])
def test_text_that_stdout_cannot_write_is_no_failure(
    encoding: str, shown: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    monkeypatch.setitem(COMMANDS, "say", ("", lambda argv: print(*argv, flush=True) or 0))
    assert main(["say", "Größe"]) == 0
    assert written.getvalue() == shown


def test_stdout_may_be_anything_that_can_be_printed_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", written := io.StringIO())
    assert main(["--version"]) == 0
    assert written.getvalue().startswith("baton ")


@pytest.mark.parametrize("command", ["up", "prefill", "decode"])
def test_what_starts_workers_elsewhere_than_on_linux_says_where_they_run(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert main([command]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"baton {command}: this is darwin, and workers run on Linux: start them in a container")
