"""The log of the frames that were sent, and how a frame is encoded."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client_side.frames import FrameLog, FrameMemo, SentFrame, encode_frame, read_frames
from protos import node_pb2
from tests.released import released
from wire.codec import encode
from wire.errors import CheckpointError


def a_frame(step: int, micro_batch: int = 0, size: int = 100) -> SentFrame:
    filler = torch.full((size,), float(step))
    return encode_frame(step=step, micro_batch=micro_batch, phase=node_pb2.PHASE_FORWARD, tensors=[released(filler)])


def segments(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.frames"))


def test_the_log_gives_back_the_very_frames_from_a_step_on(tmp_path: Path) -> None:
    log = FrameLog(tmp_path)
    sent = [a_frame(step, micro_batch) for step in range(6) for micro_batch in range(2)]
    for frame in sent:
        if (frame.step % 2, frame.micro_batch) == (0, 0):
            log.begin(frame.step)
        log.append(frame)

    found = list(log.frames(3))
    assert [frame.data for frame in found] == [frame.data for frame in sent if frame.step >= 3]
    assert [frame.place for frame in found] == [frame.place for frame in sent if frame.step >= 3]
    log.drop(3)
    assert segments(tmp_path) == ["000000000002.frames", "000000000004.frames"]
    assert log.bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="frames of step 1 are no longer kept"):
        next(log.frames(1))
    log.close()


def test_nothing_is_dropped_while_frames_are_replayed(tmp_path: Path) -> None:
    import threading  # noqa: PLC0415

    log = FrameLog(tmp_path)
    for step in range(3):
        log.begin(step)
        log.append(a_frame(step))
    dropping = threading.Thread(target=log.drop, args=(2,))
    with log.hold:
        dropping.start()
        dropping.join(0.2)
        assert [frame.step for frame in log.frames(0)] == [0, 1, 2]
    dropping.join(5)

    assert segments(tmp_path) == ["000000000002.frames"]
    log.close()


def test_T07_a_torn_or_damaged_segment_is_read_up_to_there(tmp_path: Path) -> None:
    log = FrameLog(tmp_path)
    log.begin(0)
    for step in range(1, 4):
        log.append(a_frame(step, size=20))
    log.close()
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    record = len(whole) // 3

    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert len(list(read_frames(path))) == size // record
    for at in range(len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 0x41
        path.write_bytes(damaged)
        assert len(list(read_frames(path))) == at // record
    with pytest.raises(CheckpointError, match="is damaged: "):
        list(log.frames(0))


def test_what_was_sent_first_is_what_is_sent_again(tmp_path: Path) -> None:
    log = FrameLog(tmp_path)
    log.begin(4)
    first = [a_frame(step) for step in (4, 5, 6)]
    for frame in first:
        log.append(frame)
    log.close()
    memo = FrameMemo(tmp_path, 5)
    again = FrameLog(tmp_path)
    again.begin(5)
    again.append(dataclasses.replace(first[1], data=b"otherwise"))
    again.close()
    later = FrameMemo(tmp_path, 5)

    assert len(memo) == 2
    other = dataclasses.replace(first[2], data=first[2].data[::-1])
    assert memo.take(other).data == first[2].data
    assert memo.take(other) is other  # once
    assert memo.take(first[1]) is first[1]
    assert later.take(dataclasses.replace(first[1], data=b"a third")).data == first[1].data
    new = a_frame(9)
    assert later.take(new) is new
    later.drop(7)
    assert len(later) == 0
    assert segments(tmp_path / "old") == []


def test_frames_may_be_asked_for_while_others_are_dropped(tmp_path: Path) -> None:
    import threading  # noqa: PLC0415

    log = FrameLog(tmp_path)
    log.begin(0)
    for step in range(3000):
        log.append(SentFrame(step, 0, 1, update=False, data=b"x"))
    log.close()
    memo = FrameMemo(tmp_path, 0)
    failed: list[BaseException] = []

    def drop() -> None:
        try:
            for step in range(0, 3000, 10):
                memo.drop(step)
        except BaseException as error:  # noqa: BLE001 - the test tells it
            failed.append(error)

    dropping = threading.Thread(target=drop)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        dropping.start()
        for step in reversed(range(3000)):
            memo.take(SentFrame(step, 0, 1, update=False, data=b"y"))
        dropping.join()
    finally:
        sys.setswitchinterval(before)

    assert not failed


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]))
    whole = torch.randint(0, 2 if dtype is torch.bool else 100, shape, generator=torch.Generator().manual_seed(1))
    made = whole.to(dtype)
    return made.t() if made.ndim == 2 and draw(st.booleans()) else made


@given(
    step=st.integers(0, 2**53),
    micro_batch=st.integers(0, 2**32 - 1),
    phase=st.sampled_from([1, 2, 3, 4]),
    update=st.booleans(),
    weight=st.floats(allow_nan=False),
    sent=st.lists(st.none() | tensors(), max_size=3),
    labels=st.none() | tensors(),
)
def test_a_frame_is_encoded_as_protobuf_itself_encodes_it(  # noqa: PLR0917 - Hypothesis names them
    step: int,
    micro_batch: int,
    phase: Any,
    update: bool,  # noqa: FBT001
    weight: float,
    sent: list[torch.Tensor | None],
    labels: torch.Tensor | None,
) -> None:
    made = encode_frame(
        step=step,
        micro_batch=micro_batch,
        phase=phase,
        update=update,
        loss_weight=weight,
        tensors=[None if t is None else released(t) for t in sent],
        labels=None if labels is None else released(labels),
    )
    from protos import tensor_pb2  # noqa: PLC0415

    meant = node_pb2.TrainRequest(
        frame=node_pb2.Frame(
            step=step,
            micro_batch=micro_batch,
            phase=phase,
            update=update,
            loss_weight=weight,
            tensors=[tensor_pb2.Tensor() if t is None else encode(t) for t in sent],
            labels=None if labels is None else encode(labels),
        )
    )

    assert node_pb2.TrainRequest.FromString(made.data) == meant
    assert made.tensor_bytes == sum(t.nbytes for t in (*sent, labels) if t is not None)
    assert made.place == (step, micro_batch, phase)
