"""The program without a process of its own, where only its words and its code matter: importing takes seconds."""

from __future__ import annotations

import subprocess

import pytest

from cloister.main import app

__all__ = ["Inside"]


class Inside:
    """Runs a command line in this process; the fixture ``inside`` makes one, in the checkout's folder."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        words = [str(argument) for argument in arguments]
        with pytest.raises(SystemExit) as ended:
            app(words)
        out, err = self._capsys.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), out, err)
