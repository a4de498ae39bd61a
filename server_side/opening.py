"""Opening a session from foreign bytes: everything is checked against limits before it is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import torch

from protos import node_pb2
from provenance.tallies import HASHES, SALT_BYTES, spec_digest
from server_side.accounts import Accounts, Limits, Reservation
from server_side.kept import KeptSnapshots
from server_side.session import ANSWER_SLACK_BYTES, ANSWERS_BYTES, SessionPlan, run_bytes
from server_side.signing import ReceiptPlan
from wire.errors import (
    LimitExceededError,
    MessageRejectedError,
    ProgramRejectedError,
    SpecRejectedError,
    StateRejectedError,
)
from wire.program import Program, ProgramLimits, decode_program, program_digest
from wire.recipe import Adam, AdamW, Optimizer, loss_from_proto, optimizer_from_proto
from wire.state import gather, load_state, rows_of

__all__ = ["Opening", "plan_of", "read_program", "read_spec", "read_state"]

ID_BYTES: Final = 16
_DIGEST_BYTES: Final = 32
_MAX_ROWS: Final = 2**20  # rows of one micro-batch; no model has use for more
_MAX_STEP: Final = 2**53
_FRAME_BYTES: Final = 4096  # of a state: what says how long its header is, a table's rows, padding
_ENTRY_BYTES: Final = 256  # of a state's header: a tensor's dtype, shape and place, and what stands before its name


@dataclass(frozen=True, slots=True)
class Opening:
    """A session that passed every check and holds its reservation."""

    plan: SessionPlan
    program: Program
    tensors: dict[str, torch.Tensor]
    reservation: Reservation


def read_spec(parts: Iterator[node_pb2.OpenSessionRequest], fingerprint: str) -> node_pb2.SessionSpec:
    """The spec, which comes first.

    Raises:
        SpecRejectedError: incomplete, or made for another node (T04).
        MessageRejectedError: something else came first.
    """
    first = next(parts, None)
    if first is None or first.WhichOneof("part") != "spec":
        raise MessageRejectedError("an opening starts with its spec")
    spec = first.spec
    if len(spec.session_id) != ID_BYTES:
        raise SpecRejectedError(f"a session id of {len(spec.session_id)} bytes; {ID_BYTES} random ones")
    if spec.node_fingerprint and spec.node_fingerprint.hex() != fingerprint:
        raise SpecRejectedError("this opening was made for another node")
    for name in ("program_sha256", "state_sha256"):
        if len(getattr(spec, name)) != _DIGEST_BYTES:
            raise SpecRejectedError(f"{name} of {len(getattr(spec, name))} bytes; {_DIGEST_BYTES}")
    return spec


def plan_of(spec: node_pb2.SessionSpec, limits: Limits) -> SessionPlan:
    """The spec's wishes, checked.

    Raises:
        SpecRejectedError, LimitExceededError: the first field that is wrong.
    """
    if spec.topology not in (node_pb2.TOPOLOGY_VANILLA, node_pb2.TOPOLOGY_U_SHAPE):
        raise SpecRejectedError(f"unknown topology {spec.topology}")
    vanilla = spec.topology == node_pb2.TOPOLOGY_VANILLA
    if vanilla != spec.HasField("loss"):
        raise SpecRejectedError("a vanilla session names its loss; a U-shaped one names none")
    if not 1 <= spec.max_rows <= _MAX_ROWS:
        raise SpecRejectedError(f"max_rows {spec.max_rows}: 1 to {_MAX_ROWS}")
    if spec.max_in_flight < 1:
        raise SpecRejectedError("max_in_flight: at least 1")
    if spec.max_in_flight > limits.micro_batches_in_flight:
        raise LimitExceededError(
            f"{spec.max_in_flight} micro-batches in flight; this node allows {limits.micro_batches_in_flight}",
        )
    if spec.first_step > _MAX_STEP:
        raise SpecRejectedError(f"first_step {spec.first_step}: at most 2**53")
    return SessionPlan(
        session_id=spec.session_id,
        topology=spec.topology,
        loss=loss_from_proto(spec.loss) if vanilla else None,
        optimizer=optimizer_from_proto(spec.optimizer),
        seed=spec.seed,
        max_rows=spec.max_rows,
        max_in_flight=spec.max_in_flight,
        first_step=spec.first_step,
        want_input_gradients=spec.want_input_gradients,
        activation_bytes_per_micro_batch=limits.activation_bytes_per_micro_batch,
        tensor_bytes=limits.tensor_bytes,
        receipts=_receipts(spec),
    )


def _receipts(spec: node_pb2.SessionSpec) -> ReceiptPlan | None:
    """What the owner's receipts are over; ``None`` where it wants none, or none that this node can make."""
    if not spec.receipt_hashes:
        return None
    if len(spec.receipt_salt) != SALT_BYTES:
        raise SpecRejectedError(f"a receipt_salt of {len(spec.receipt_salt)} bytes; {SALT_BYTES} random ones")
    kind = next((name for name in spec.receipt_hashes if name in HASHES), None)
    if kind is None:
        return None
    return ReceiptPlan("blake3" if kind == "blake3" else "sha256", spec.receipt_salt, spec_digest(spec))


def read_program(parts: Iterator[node_pb2.OpenSessionRequest], spec: node_pb2.SessionSpec, limits: Limits) -> Program:
    """The program, from as many chunks as its announced size takes.

    Raises:
        ProgramRejectedError, LimitExceededError, StateRejectedError: see :func:`decode_program` and :func:`gather`.
    """
    if spec.program_bytes > limits.program_bytes:
        raise LimitExceededError(f"a program of {spec.program_bytes} bytes; the limit is {limits.program_bytes}")
    data = bytearray()
    while len(data) < spec.program_bytes:
        piece = _next_chunk(parts, "program_chunk")
        if len(data) + len(piece) > spec.program_bytes:
            raise ProgramRejectedError(f"more than the {spec.program_bytes} bytes of program that were announced")
        data += piece
    bounds = ProgramLimits(
        bytes=limits.program_bytes,
        operations=limits.program_operations,
        elements=2 * limits.parameters_per_session,
    )
    program = decode_program(bytes(data), bounds)
    if program_digest(bytes(data)) != spec.program_sha256:
        raise ProgramRejectedError("the program does not hash to what was announced")
    if program.parameter_count > limits.parameters_per_session:
        raise LimitExceededError(
            f"{program.parameter_count} parameters; this node allows {limits.parameters_per_session}",
        )
    return program


def read_state(
    parts: Iterator[node_pb2.OpenSessionRequest],
    spec: node_pb2.SessionSpec,
    plan: SessionPlan,
    program: Program,
    *,
    owner: str,
    accounts: Accounts,
    kept: KeptSnapshots,
) -> Opening:
    """The tensors, after their room has been reserved: from the owner, or as the node kept them for it.

    Raises:
        LimitExceededError, BusyError: no room for them, ever or now.
        StateRejectedError: other bytes than announced.
    """
    copies = 2 + _optimizer_slots(plan.optimizer)  # the tensors, their gradients, the optimizer's own
    header = _FRAME_BYTES + copies * sum(len(s.name.encode()) + _ENTRY_BYTES for s in program.state)
    if spec.state_bytes > copies * program.state_bytes + spec.rows_bytes + header:
        raise SpecRejectedError(
            f"{spec.state_bytes} bytes of state for a program whose tensors hold {program.state_bytes}"
        )
    # Once more for the copy that a snapshot takes while the session trains on.
    held = 2 * (copies * program.state_bytes + spec.rows_bytes)
    made = max(
        run_bytes(program, graph, plan.max_rows, plan.activation_bytes_per_micro_batch)
        for graph in (program.train, program.eval)
    )
    came = plan.max_rows * sum(math.prod(i.shape) * i.dtype.itemsize for i in program.inputs)
    # In flight, a micro-batch holds its inputs, their gradients, its activations, and its two answers.
    answered = min(made, plan.tensor_bytes + ANSWER_SLACK_BYTES) + came
    held += (made + 2 * came + answered) * plan.max_in_flight + ANSWERS_BYTES
    reservation = accounts.reserve(owner, held, program.parameter_count)
    try:
        if spec.state_kept:
            data = _kept(kept, owner, spec)
        else:
            data = gather(_chunks(parts, spec.state_bytes), spec.state_bytes, spec.state_sha256, "state")
        tensors = load_state(data, header_bytes=header)
        _check_rows(tensors, spec)
        return Opening(plan, program, tensors, reservation)
    except BaseException:
        reservation.release()
        raise


def _check_rows(tensors: dict[str, torch.Tensor], spec: node_pb2.SessionSpec) -> None:
    if sum(tensor.nbytes for tensor in rows_of(tensors).values()) > spec.rows_bytes:
        raise SpecRejectedError(f"a table larger than the {spec.rows_bytes} bytes that were announced")


def _kept(kept: KeptSnapshots, owner: str, spec: node_pb2.SessionSpec) -> bytes:
    found = kept.find(owner, digest=spec.state_sha256)
    if found is None or found.step != spec.first_step:
        raise StateRejectedError("this node no longer keeps that state; send it")
    data = kept.read(found)
    if len(data) != spec.state_bytes:
        raise StateRejectedError(f"{len(data)} bytes of state are kept where {spec.state_bytes} were announced")
    return data


def _chunks(parts: Iterator[node_pb2.OpenSessionRequest], size: int) -> Iterator[bytes]:
    seen = 0
    while seen < size:
        piece = _next_chunk(parts, "state_chunk")
        seen += len(piece)
        yield piece


def _next_chunk(parts: Iterator[node_pb2.OpenSessionRequest], name: str) -> bytes:
    part = next(parts, None)
    if part is None or part.WhichOneof("part") != name:
        raise MessageRejectedError(f"the opening ends or goes on to something else before its last {name}")
    piece: bytes = getattr(part, name)
    if not piece:
        raise MessageRejectedError(f"an empty {name}")
    return piece


def _optimizer_slots(optimizer: Optimizer) -> int:
    if isinstance(optimizer, (Adam, AdamW)):
        return 3 if optimizer.amsgrad else 2
    return 1 if optimizer.momentum else 0
