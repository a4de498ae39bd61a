"""Frames as they were sent: the very bytes, kept on disk until a snapshot makes them superfluous.

With a snapshot of step ``k`` and the frames from step ``k`` on, any node can be brought to the present step: it gets
the same bytes that the first one got, and computes the same numbers. Nothing is drawn or rounded anew.

A log is a folder of segments, one for the steps between two checkpoints, each a file of records. A record is a header
(CRC-32 of the rest, length, step, micro-batch, phase, update) and the message's bytes. What a killed process left
half-written at the end of a segment is not read.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import struct
import threading
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from client_side.disk import disk_errors
from privacy.guard import Released
from protos import encryption_pb2, node_pb2
from wire.codec import MAX_TENSOR_BYTES, encode_parts, raw_bytes
from wire.errors import CheckpointError
from wire.messages import delimited

__all__ = ["FrameLog", "FrameMemo", "SentCiphertexts", "SentFrame", "encode_frame", "read_frames"]

_HEADER: Final = struct.Struct("<IIQIB?")
_OLD: Final = "old"
_NUMBERED: Final = f"{'[0-9]' * 6}-*.frames"
_CRC: Final = struct.Struct("<I")
_MAX_FRAME_BYTES: Final = MAX_TENSOR_BYTES + 64 * 2**20  # what a node takes at most, and more


@dataclass(frozen=True, slots=True)
class SentFrame:
    """One frame: where it belongs, its bytes as a ``TrainRequest``, and how many of them are tensors' own."""

    step: int
    micro_batch: int
    phase: int
    update: bool
    data: bytes = field(repr=False)
    tensor_bytes: int = 0

    @property
    def place(self) -> tuple[int, int, int]:
        """What tells it from all others of a run."""
        return self.step, self.micro_batch, self.phase


@dataclass(frozen=True, slots=True)
class SentCiphertexts:
    """Ciphertexts that the guard let out."""

    block_rows: int
    seeds: Released
    words: Released

    @property
    def nbytes(self) -> int:
        """Of seeds and words."""
        return self.seeds.tensor.nbytes + self.words.tensor.nbytes

    def message(self) -> encryption_pb2.Ciphertexts:
        """Whole."""
        seeds, words = bytes(raw_bytes(self.seeds.tensor)), bytes(raw_bytes(self.words.tensor))
        return encryption_pb2.Ciphertexts(
            count=len(self.seeds.tensor), block_rows=self.block_rows, seeds=seeds, words=words
        )

    def parts(self) -> list[bytes | memoryview]:
        """The message, as pieces to be joined."""
        head = encryption_pb2.Ciphertexts(count=len(self.seeds.tensor), block_rows=self.block_rows)
        seeds, words = raw_bytes(self.seeds.tensor), raw_bytes(self.words.tensor)
        return [
            head.SerializeToString(),
            *delimited(encryption_pb2.Ciphertexts.SEEDS_FIELD_NUMBER, [seeds]),
            *delimited(encryption_pb2.Ciphertexts.WORDS_FIELD_NUMBER, [words]),
        ]


def encode_frame(
    *,
    step: int,
    micro_batch: int,
    phase: node_pb2.Phase.ValueType,
    tensors: Sequence[Released | None] = (),
    labels: Released | None = None,
    rows: Released | None = None,
    loss_weight: float = 0.0,
    update: bool = False,
    ciphertexts: SentCiphertexts | None = None,
) -> SentFrame:
    """A frame. ``None`` among output gradients says that there is none, not even zeros.

    ``rows`` are indices of a table that the session keeps, in place of tensors and labels.

    Raises:
        TensorRejectedError: a tensor whose dtype does not travel.
    """
    frame = node_pb2.Frame(step=step, micro_batch=micro_batch, phase=phase, update=update, loss_weight=loss_weight)
    if rows is not None:
        frame.rows.extend(rows.tensor.tolist())
    parts: list[bytes | memoryview] = [frame.SerializeToString()]
    sent = sum(len(part) for part in parts) if rows is not None else 0
    for tensor in (None if released is None else released.tensor for released in tensors):
        parts += delimited(node_pb2.Frame.TENSORS_FIELD_NUMBER, () if tensor is None else encode_parts(tensor))
        sent += 0 if tensor is None else tensor.nbytes
    if labels is not None:
        parts += delimited(node_pb2.Frame.LABELS_FIELD_NUMBER, encode_parts(labels.tensor))
        sent += labels.tensor.nbytes
    if ciphertexts is not None:
        parts += delimited(node_pb2.Frame.CIPHERTEXTS_FIELD_NUMBER, ciphertexts.parts())
        sent += ciphertexts.nbytes
    data = b"".join(delimited(node_pb2.TrainRequest.FRAME_FIELD_NUMBER, parts))
    return SentFrame(step, micro_batch, phase, update, data, sent)


class FrameLog:
    """What was sent since the oldest snapshot that may still be needed. For one thread, but for :meth:`drop`.

    Attributes:
        written: bytes since the beginning.
        hold: while a thread has it, nothing is dropped.
    """

    def __init__(self, folder: Path) -> None:
        """An empty log; removes what an earlier one left in ``folder``.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._folder = folder
        self.written = 0
        self.hold = threading.RLock()
        self._file: int | None = None
        self._segments: dict[int, int] = {}
        self._current = 0
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.glob("*.frames"):
                old.unlink()

    @property
    def bytes(self) -> int:
        """On disk now."""
        return sum(self._segments.values())

    def begin(self, step: int) -> None:
        """Frames from here on, the first of them of ``step``, go into a segment of their own."""
        self.close()
        with disk_errors(self._folder):
            self._file = os.open(self._path(step), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        self._current = step
        self._segments[step] = 0

    def append(self, frame: SentFrame) -> None:
        """Hands ``frame`` to the system: it outlives this process, though not the machine.

        Raises:
            CheckpointError: the disk is full, or fails.
        """
        if self._file is None:
            raise CheckpointError("a frame before the log's first segment")
        header = _HEADER.pack(0, len(frame.data), frame.step, frame.micro_batch, frame.phase, frame.update)
        crc = zlib.crc32(frame.data, zlib.crc32(header[_CRC.size :]))
        parts = [memoryview(_CRC.pack(crc) + header[_CRC.size :]), memoryview(frame.data)]
        with disk_errors(self._folder):
            while parts:
                wrote = os.writev(self._file, parts)
                self._segments[self._current] += wrote
                self.written += wrote
                while parts and wrote >= len(parts[0]):
                    wrote -= len(parts.pop(0))
                if parts:
                    parts[0] = parts[0][wrote:]

    def drop(self, step: int) -> None:
        """Forgets the segments whose frames all belong to steps before ``step``."""
        with self.hold:
            for start, following in itertools.pairwise(sorted(self._segments)):
                if following <= step:
                    with disk_errors(self._folder):
                        self._path(start).unlink(missing_ok=True)
                    self._segments.pop(start)

    def frames(self, step: int) -> Iterator[SentFrame]:
        """Everything sent from ``step`` on, in the order of sending.

        Raises:
            CheckpointError: the log was dropped beyond ``step``, or is damaged.
        """
        starts = sorted(self._segments)
        if not starts or starts[0] > step:
            raise CheckpointError(f"the frames of step {step} are no longer kept")
        for start, following in itertools.zip_longest(starts, starts[1:]):
            if following is not None and following <= step:
                continue
            seen = 0
            for frame in read_frames(self._path(start)):
                seen += _HEADER.size + len(frame.data)
                if frame.step >= step:
                    yield frame
            if seen != self._segments[start]:
                raise CheckpointError(f"the frame log {self._path(start)} is damaged: {seen} bytes of it can be read")

    def close(self) -> None:
        """Writes no more to the last segment."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _path(self, step: int) -> Path:
        return self._folder / f"{step:012d}.frames"


def read_frames(path: Path) -> Iterator[SentFrame]:
    """The frames of one segment, up to the first record that is torn or damaged."""
    try:
        opened = path.open("rb")
    except OSError:
        return
    with opened as file:
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            crc, length, step, micro_batch, phase, update = _HEADER.unpack(header)
            if length > _MAX_FRAME_BYTES:
                return
            data = file.read(length)
            if len(data) != length or zlib.crc32(data, zlib.crc32(header[_CRC.size :])) != crc:
                return
            yield SentFrame(step, micro_batch, phase, update, data, len(data))


class FrameMemo:
    """What an earlier process of a run sent beyond the checkpoint that the run resumes from.

    For one thread, but for :meth:`drop`.

    The steps are computed anew and come out the same. Should they not (another processor), or should a frame hold noise
    that was drawn and accounted for, the bytes that left once are the ones that leave again.
    """

    def __init__(self, folder: Path, step: int) -> None:
        """Takes the segments of ``folder`` over, and reads which frames of ``step`` and later they hold.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        self._folder = folder / _OLD
        self._at: dict[tuple[int, int, int], tuple[Path, int, int]] = {}
        self._lock = threading.Lock()
        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            count = max((int(path.name[:6]) + 1 for path in self._folder.glob(_NUMBERED)), default=0)
            for path in sorted(folder.glob("*.frames")):
                path.rename(self._folder / f"{count:06d}-{path.name}")
                count += 1
        for path in sorted(self._folder.glob("*.frames")):
            self._scan(path, step)
        wanted = {path for path, _, _ in self._at.values()}
        with disk_errors(self._folder):
            for path in self._folder.glob("*.frames"):
                if path not in wanted:  # the same steps again, of a process that got no further than one before it
                    path.unlink()

    def __len__(self) -> int:
        """Frames that may still be asked for."""
        return len(self._at)

    def take(self, frame: SentFrame) -> SentFrame:
        """``frame`` as it was sent before, or as it is."""
        with self._lock:
            found = self._at.pop(frame.place, None)
        if found is None:
            return frame
        path, offset, length = found
        try:
            with path.open("rb") as file:
                file.seek(offset)
                record = file.read(_HEADER.size + length)
        except OSError:
            return frame
        data = record[_HEADER.size :]
        if zlib.crc32(record[_CRC.size :]) != _CRC.unpack_from(record)[0]:
            return frame
        return dataclasses.replace(frame, data=data) if data != frame.data else frame

    def drop(self, step: int) -> None:
        """Forgets what belongs to steps before ``step``; with the last frame, the files go."""
        with self._lock:
            self._at = {place: at for place, at in self._at.items() if place[0] >= step}
            left = len(self._at)
        if not left:
            with disk_errors(self._folder):
                for path in self._folder.glob("*.frames"):
                    path.unlink()

    def _scan(self, path: Path, step: int) -> None:
        with disk_errors(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            offset = 0
            while offset + _HEADER.size <= size:
                file.seek(offset)
                _, length, at, micro_batch, phase, _ = _HEADER.unpack(file.read(_HEADER.size))
                if offset + _HEADER.size + length > size:
                    return  # torn
                if at >= step:
                    self._at.setdefault((at, micro_batch, phase), (path, offset, length))
                offset += _HEADER.size + length
