"""A node among a hostile owner and a good one, who is in the middle of a step whenever the other attacks."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Final

import psutil
import pytest
import torch
from torch import nn

from client_side.spawn import LocalNode
from protos import node_pb2
from tests.wire_client import Good, Job, WireClient, new_owner
from wire.codec import encode
from wire.identity import Identity

__all__ = [
    "BACKWARD",
    "FORWARD",
    "LIMITS",
    "MESSAGE_BYTES",
    "METHODS",
    "MIB",
    "NAN",
    "Stage",
    "ask",
    "batch",
    "stage",
    "the_other_owner_trains_on",
    "tiny",
]

MIB: Final = 2**20
MESSAGE_BYTES: Final = 32 * MIB
METHODS: Final = [method.name for method in node_pb2.DESCRIPTOR.services_by_name["Node"].methods]
FORWARD, BACKWARD = node_pb2.PHASE_FORWARD, node_pb2.PHASE_BACKWARD
NAN: Final = float("nan")
LIMITS: Final = {
    "message_bytes": MESSAGE_BYTES,
    "tensor_bytes": 16 * MIB,
    "sessions_per_owner": 40,
    "bytes_per_owner": 8 * 2**30,
    "parameters_per_session": 1_000_000,
    "activation_bytes_per_micro_batch": 64 * MIB,
    "micro_batches_in_flight": 4,
}


@dataclasses.dataclass(frozen=True, slots=True)
class Stage:
    """A node, a hostile owner and a good one."""

    node: LocalNode
    process: psutil.Process
    foe: WireClient
    friend: WireClient
    friend_identity: Identity
    tiny: Job
    good: Good


@pytest.fixture(scope="module")
def tiny() -> Job:
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
    return Job.of(middle, torch.randn(4, 6))


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, tiny: Job) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("hostile")
    options = [word for name, number in LIMITS.items() for word in ("--limit", f"{name}={number}")]
    friend = new_owner("friend")
    with LocalNode(folder, threads=1, options=options) as node:
        (folder / "trusted" / "friend.crt").write_bytes(friend.certificate_pem)
        with WireClient(node.address, node.owner) as foe, WireClient(node.address, friend) as ours:
            process = psutil.Process(node.process.pid)
            yield Stage(node, process, foe, ours, friend, tiny, Good(ours, tiny))
        assert node.process.poll() is None
        said = node.log.read_text()
        for word in ("Traceback", "a defect in this node", "Exception calling", "Exception iterating"):
            assert word not in said, said[said.index(word) - 500 :][:3000]


@pytest.fixture(autouse=True)
def the_other_owner_trains_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """Around each attack on the shared node another owner is in the middle of a step, and ends it right."""
    if "stage" not in request.fixturenames:
        yield
        return
    good: Good = request.getfixturevalue("stage").good
    good.begin()
    yield
    good.finish()
    good.step()
    good.check()


def ask(frame_: node_pb2.Frame) -> node_pb2.TrainRequest:
    return node_pb2.TrainRequest(frame=frame_)


def batch(*tensors: torch.Tensor) -> node_pb2.InferRequest:
    return node_pb2.InferRequest(batch=node_pb2.Batch(tensors=[encode(t) for t in tensors]))
