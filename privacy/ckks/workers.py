"""Worker processes for a key per step: the owner's own threads never wait for the library, only for their pipes."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import secrets
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from privacy.ckks.pipes import (
    ANSWER,
    DECRYPT,
    ENCRYPT,
    ENCRYPT_REAL,
    PREPARE,
    REQUEST,
    SECRET_BYTES,
    read_exactly,
)
from wire.ciphertexts import RINGS, SEED_BYTES, SQUARE_RINGS, Ciphertexts, Ring
from wire.errors import ConfigError, EncryptionError

__all__ = ["MOST_WORKERS", "CipherWorkers", "Encrypted", "StepKey", "require_library"]

MOST_WORKERS: Final = 8  # beyond, a step of some hundred ciphertexts is not worth the processes
_LEAST_EACH: Final = 12  # ciphertexts, which take longer than making one more key
_GOODBYE_S: Final = 5.0


def require_library() -> None:
    """Raises: ConfigError where the library of encryption is not installed, and says what to install."""
    missing = [name for name in ("tenseal", "zstandard") if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"encryption needs {' and '.join(missing)} on this machine (the node needs neither): "
            'pip install "cloister[ckks]"'
        )


@dataclass(frozen=True, slots=True)
class StepKey:
    """The secret that one step's key is made of. It is never written down, and never used for another step."""

    secret: bytes = field(repr=False, default_factory=lambda: secrets.token_bytes(SECRET_BYTES))


@dataclass(frozen=True, slots=True, eq=False)
class Encrypted:
    """Ciphertexts ready to travel.

    Attributes:
        seeds: uint8 [C, 64].
        words: uint8, c0 of all of them as :func:`wire.ciphertexts.pack` packs it.
    """

    seeds: npt.NDArray[np.uint8] = field(repr=False)
    words: npt.NDArray[np.uint8] = field(repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    """What one worker is asked for: with ``data`` to ``count`` ciphertexts, of which each answers ``each`` bytes."""

    kind: int
    polynomials: int
    count: int
    scale: float
    key: StepKey
    data: bytes = field(repr=False)
    each: int


class CipherWorkers:
    """Some processes that encrypt and decrypt side by side. They start with the first call."""

    def __init__(self, ring: Ring, count: int | None = None) -> None:
        """For keys of ``ring``; as many as there are processors, unless said otherwise.

        Raises:
            ConfigError: there is no library of encryption.
        """
        require_library()
        self._number, self._ring = (*RINGS, *SQUARE_RINGS).index(ring), ring
        self._count = count or min(MOST_WORKERS, os.cpu_count() or 1)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="cloister-ckks")

    @property
    def processes(self) -> tuple[int, ...]:
        """Their ids, once they run."""
        return tuple(process.pid for process in self._processes)

    def start(self) -> None:
        """Starts them, if they do not run: half a second that the first step need not wait."""
        while len(self._processes) < self._count:
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "privacy.ckks.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                )
            )

    def encrypt(
        self, key: StepKey, slots: npt.NDArray[np.complex128] | npt.NDArray[np.float64], scale: float
    ) -> Encrypted:
        """Each row of ``slots``, complex128 or float64 [C, N / 2], in a ciphertext.

        Raises:
            EncryptionError: a worker died, or its library failed.
        """
        size = SEED_BYTES + self._ring.polynomial_bytes
        kind = ENCRYPT if np.iscomplexobj(slots) else ENCRYPT_REAL
        pieces = np.array_split(slots, self._share(len(slots)))
        made = self._everywhere([_Job(kind, 1, len(piece), scale, key, piece.tobytes(), size) for piece in pieces])
        cut = [SEED_BYTES * len(piece) for piece in pieces]
        seeds = b"".join(data[:end] for data, end in zip(made, cut, strict=True))
        words = b"".join(data[end:] for data, end in zip(made, cut, strict=True))
        return Encrypted(
            np.frombuffer(seeds, dtype=np.uint8).reshape(-1, SEED_BYTES), np.frombuffer(words, dtype=np.uint8)
        )

    def decrypt(self, key: StepKey, ciphertexts: Ciphertexts, scale: float) -> npt.NDArray[np.complex128]:
        """What ciphertexts without seeds hold; complex128 [C, N / 2].

        Raises:
            EncryptionError: as for :meth:`encrypt`.
        """
        polynomials = len(ciphertexts.words)
        pieces = np.array_split(ciphertexts.words, self._share(ciphertexts.count), axis=1)
        made = self._everywhere(
            [
                _Job(DECRYPT, polynomials, piece.shape[1], scale, key, piece.tobytes(), 8 * self._ring.degree)
                for piece in pieces
            ]
        )
        return np.frombuffer(b"".join(made), dtype=np.complex128).reshape(ciphertexts.count, -1)

    def prepare(self, key: StepKey, ciphertexts: int) -> None:
        """Has the key made that so many ciphertexts will need next, while this process does something else.

        Raises:
            EncryptionError: a worker died.
        """
        self.start()
        try:
            for process in self._processes[: self._share(ciphertexts)]:
                requests, _ = _pipes(process)
                requests.write(REQUEST.pack(PREPARE, self._number, 0, 0, 0.0, key.secret))
                requests.flush()
        except (OSError, EOFError) as error:
            raise self._died() from error

    def close(self) -> None:
        """Ends them, and waits for it."""
        for process in self._processes:
            if process.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
        for process in self._processes:
            try:
                process.wait(_GOODBYE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._processes.clear()
        self._threads.shutdown()

    def _share(self, ciphertexts: int) -> int:
        """How many workers take part: each makes the key for itself."""
        return max(1, min(self._count, ciphertexts // _LEAST_EACH))

    def _everywhere(self, jobs: list[_Job]) -> list[bytes]:
        self.start()
        try:
            if len(jobs) == 1:  # nothing to wait for side by side
                return [self._ask(self._processes[0], jobs[0])]
            return list(self._threads.map(self._ask, self._processes, jobs))
        except (OSError, EOFError) as error:
            raise self._died() from error

    def _died(self) -> EncryptionError:
        """Ends what is left of them, so that the next call starts new ones."""
        self.close()
        self._threads = ThreadPoolExecutor(self._count, thread_name_prefix="cloister-ckks")
        return EncryptionError("a process that encrypts died: is there memory left? Run again, or resume")

    def _ask(self, process: subprocess.Popen[bytes], job: _Job) -> bytes:
        requests, answers = _pipes(process)
        requests.write(REQUEST.pack(job.kind, self._number, job.polynomials, job.count, job.scale, job.key.secret))
        requests.write(job.data)
        requests.flush()
        done, size = ANSWER.unpack(read_exactly(answers, ANSWER.size))
        answer = read_exactly(answers, size)
        if not done:
            raise EncryptionError(f"the library of encryption failed: {answer.decode(errors='replace')}")
        if size != job.each * job.count:
            raise EncryptionError(f"a worker answered {size} bytes where {job.each * job.count} were expected")
        return answer


def _pipes(process: subprocess.Popen[bytes]) -> tuple[BinaryIO, BinaryIO]:
    if process.stdin is None or process.stdout is None:  # both were asked for
        raise EOFError
    return process.stdin, process.stdout  # type: ignore[return-value]  # IO[bytes] and BinaryIO are one here
