"""Starts a node as a process of its own on this machine: for the demo, for benchmarks and for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from wire.errors import ConfigError
from wire.files import write_private
from wire.identity import Identity, Role, create_identity, load_identity

__all__ = ["LocalNode", "passphrase_file"]

_STOP_S: Final = 20.0


class LocalNode:
    """``cloister node`` on loopback, trusting one owner, over mutual TLS like any other.

    Attributes:
        address: what a trainer's ``node`` takes.
        owner: the identity that it trusts.
    """

    def __init__(
        self,
        folder: Path,
        *,
        options: Sequence[str] = (),
        threads: int | None = None,
        listen: str = "localhost:0",
        receipts: bool = False,
    ) -> None:
        """Makes identities in ``folder`` (kept if they are there) and starts the process.

        With ``receipts`` it signs what it computes; the passphrases of both identities are then in ``folder``.

        Raises:
            ConfigError: it did not come up; says what it printed.
        """
        self.folder = folder
        self.owner = _identity(folder / "owner", "owner", keep=receipts)
        self.identity = _identity(folder / "node", "node", keep=receipts)
        trust = folder / "trusted"
        trust.mkdir(exist_ok=True)
        (trust / "owner.crt").write_bytes(self.owner.certificate_pem)
        command = [sys.executable, "-m", "cloister", "node", "--identity", str(folder / "node"), "--trust", str(trust)]
        command += [
            "--listen",
            listen,
            "--state-dir",
            str(folder / "state"),
            "--format",
            "json",
            "--drain-seconds",
            "0",
        ]
        if receipts:
            command += ["--passphrase-file", str(passphrase_file(folder / "node"))]
        environment = dict(os.environ)
        if threads is not None:
            command += ["--threads", str(threads)]
            environment["OMP_NUM_THREADS"] = str(threads)
        self.log = folder / "node.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(  # noqa: S603 -- our own program
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self.ready: dict[str, Any] = self._wait()
        self.address = str(self.ready["address"])
        self.port = int(self.address.partition("#")[0].rpartition(":")[2])

    def __enter__(self) -> Self:
        """The running node."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        """Stops it."""
        self.stop()

    def stop(self) -> int:
        """SIGTERM, and SIGKILL if that is not heard; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()
        return self.process.wait()

    def kill(self) -> None:
        """SIGKILL: as a machine that loses power."""
        self.process.kill()
        self.stop()

    def _wait(self) -> dict[str, Any]:
        lines: list[str] = []
        if self.process.stdout is not None:
            for line in self.process.stdout:
                lines.append(line.decode(errors="replace"))
                try:
                    ready: dict[str, Any] = json.loads("".join(lines))
                except ValueError:
                    continue
                return ready
        self.process.wait()
        said = self.log.read_text(errors="replace").strip().splitlines()
        raise ConfigError(f"the node did not start: {' '.join(said[-3:]) or 'it said nothing'} (see {self.log})")


def passphrase_file(folder: Path) -> Path:
    """Where the passphrase of a throw-away identity is kept, if it is."""
    return folder.with_name(folder.name + ".passphrase")


def _identity(folder: Path, role: Role, *, keep: bool = False) -> Identity:
    if folder.exists():
        return load_identity(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    passphrase = os.urandom(16).hex()  # else nothing is signed with it, and nobody needs it again, or could guess it
    if keep:
        write_private(passphrase_file(folder), passphrase.encode())
    return create_identity(folder, role=role, passphrase=passphrase, kdf_cost=2)
