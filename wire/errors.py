"""Every error that Cloister raises on purpose, and what a peer sees of it.

The tree::

    CloisterError
    ├── ConfigError               a job file, flag or argument is wrong (never crosses the wire)
    ├── CutError                  a model cannot be cut as asked (never crosses the wire)
    ├── CheckpointError           a checkpoint or its disk fails, or is another run's (never crosses the wire)
    ├── ReleaseRefusedError       what the policy does not name stays here (never crosses the wire)
    │   └── BudgetSpentError          one release more would cost more than may be spent
    ├── LedgerError               the privacy ledger cannot be written, or has forgotten something (never crosses)
    ├── HijackSuspectedError      the node's gradients steer the front (never crosses the wire)
    ├── ProvenanceError           a record, proof, commitment or log does not hold (never crosses the wire)
    │   ├── AnchorError               a chain does not answer, or contradicts itself or the log
    │   └── ReceiptError              a node signed something else than what was exchanged
    ├── IdentityError             a key, certificate or pin is missing, damaged or refused locally
    ├── UnreachableError          no node answered in time                          UNAVAILABLE
    └── WireError                 crosses the wire, with a status and a stable reason
        ├── MessageRejectedError      not a message of ours                         INVALID_ARGUMENT
        ├── TensorRejectedError       header, size or content of a tensor           INVALID_ARGUMENT
        ├── ProgramRejectedError      not a program this node runs                  INVALID_ARGUMENT
        ├── StateRejectedError        weights that do not fit the program           INVALID_ARGUMENT
        ├── SpecRejectedError         a session's spec is incomplete or wrong       INVALID_ARGUMENT
        ├── LimitExceededError        larger than this node's stated limits         RESOURCE_EXHAUSTED
        ├── BusyError                 no room now; try later or elsewhere           RESOURCE_EXHAUSTED
        ├── StorageError              the node's disk or database fails             UNAVAILABLE
        ├── DrainingError             the node takes no new sessions                UNAVAILABLE
        ├── NotAuthorizedError        this certificate may not do this              PERMISSION_DENIED
        ├── SessionNotFoundError      no such session (for this owner)              NOT_FOUND
        ├── SessionLostError          the node restarted; the session's state died  DATA_LOSS
        ├── SessionReusedError        that session id was spent                     ALREADY_EXISTS
        ├── SessionSupersededError    another stream of the owner took over         ABORTED
        ├── StepOutOfOrderError       a frame that cannot follow the last one       FAILED_PRECONDITION
        ├── NonFiniteError            NaN or Inf arrived or came out                FAILED_PRECONDITION
        ├── ComputeError              an operator refused its arguments             FAILED_PRECONDITION
        └── InternalError             a defect in the peer; details stay there      INTERNAL

A status travels as ``google.rpc.Status`` with one ``google.rpc.ErrorInfo`` (AIP-193): the reason is stable, the message
is for people. Text of unexpected exceptions never crosses the wire.
"""

from __future__ import annotations

from typing import ClassVar, Final

import grpc
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.message import DecodeError
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

__all__ = [
    "DOMAIN",
    "AnchorError",
    "BudgetSpentError",
    "BusyError",
    "CheckpointError",
    "CloisterError",
    "ComputeError",
    "ConfigError",
    "CutError",
    "DrainingError",
    "HijackSuspectedError",
    "IdentityError",
    "InternalError",
    "LedgerError",
    "LimitExceededError",
    "MessageRejectedError",
    "NonFiniteError",
    "NotAuthorizedError",
    "ProgramRejectedError",
    "ProvenanceError",
    "ReceiptError",
    "ReleaseRefusedError",
    "SessionLostError",
    "SessionNotFoundError",
    "SessionReusedError",
    "SessionSupersededError",
    "SpecRejectedError",
    "StateRejectedError",
    "StepOutOfOrderError",
    "StorageError",
    "TensorRejectedError",
    "UnreachableError",
    "WireError",
    "error_from_rpc",
    "status_of",
]

DOMAIN: Final = "cloister.v1"

# A status travels twice in its trailers, percent-encoded (up to 3 bytes a byte) and in base64 (4/3); gRPC takes 8 KiB.
_MAX_MESSAGE_BYTES: Final = 1700


class CloisterError(Exception):
    """The root: whatever Cloister raises on purpose."""


class ConfigError(CloisterError):
    """A job file, an option or an argument is wrong."""


class CutError(CloisterError):
    """A model cannot be cut as asked."""


class CheckpointError(CloisterError):
    """A checkpoint is damaged, cannot be written, or belongs to another run."""


class ReleaseRefusedError(CloisterError):
    """The policy does not let this leave."""


class BudgetSpentError(ReleaseRefusedError):
    """One release more would cost more than may be spent on this data set."""


class LedgerError(CloisterError):
    """The privacy ledger cannot be written, or knows less than it once did."""


class HijackSuspectedError(CloisterError):
    """The input gradients of a node steer the front instead of following the labels."""


class ProvenanceError(CloisterError):
    """A record, a proof, a commitment or a log does not hold."""


class AnchorError(ProvenanceError):
    """The chain that a log is anchored on cannot be asked, or says something that cannot be."""


class ReceiptError(ProvenanceError):
    """What a node signed, or returned, is not what the owner saw it do."""


class IdentityError(CloisterError):
    """A key, a certificate or a pin is missing, damaged or refused."""


class UnreachableError(CloisterError):
    """No node answered in time."""


class WireError(CloisterError):
    """An error that one side tells the other, by a gRPC status and a stable reason."""

    status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    reason: ClassVar[str] = "INTERNAL"
    #: Whether the same request may succeed later, on the same node, unchanged.
    retryable: ClassVar[bool] = False


class MessageRejectedError(WireError):
    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "MESSAGE_REJECTED"


class TensorRejectedError(WireError):
    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "TENSOR_REJECTED"


class ProgramRejectedError(WireError):
    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "PROGRAM_REJECTED"


class StateRejectedError(WireError):
    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "STATE_REJECTED"


class SpecRejectedError(WireError):
    status = grpc.StatusCode.INVALID_ARGUMENT
    reason = "SPEC_REJECTED"


class LimitExceededError(WireError):
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "LIMIT_EXCEEDED"


class BusyError(WireError):
    status = grpc.StatusCode.RESOURCE_EXHAUSTED
    reason = "BUSY"
    retryable = True


class StorageError(WireError):
    status = grpc.StatusCode.UNAVAILABLE
    reason = "STORAGE_FAILED"


class DrainingError(WireError):
    status = grpc.StatusCode.UNAVAILABLE
    reason = "DRAINING"


class NotAuthorizedError(WireError):
    status = grpc.StatusCode.PERMISSION_DENIED
    reason = "NOT_AUTHORIZED"


class SessionNotFoundError(WireError):
    status = grpc.StatusCode.NOT_FOUND
    reason = "SESSION_NOT_FOUND"


class SessionLostError(WireError):
    status = grpc.StatusCode.DATA_LOSS
    reason = "SESSION_LOST"


class SessionReusedError(WireError):
    status = grpc.StatusCode.ALREADY_EXISTS
    reason = "SESSION_REUSED"


class SessionSupersededError(WireError):
    status = grpc.StatusCode.ABORTED
    reason = "SESSION_SUPERSEDED"


class StepOutOfOrderError(WireError):
    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "STEP_OUT_OF_ORDER"


class NonFiniteError(WireError):
    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "NON_FINITE"


class ComputeError(WireError):
    status = grpc.StatusCode.FAILED_PRECONDITION
    reason = "COMPUTE_FAILED"


class InternalError(WireError):
    status = grpc.StatusCode.INTERNAL
    reason = "INTERNAL"


def _leaves(cls: type[WireError]) -> list[type[WireError]]:
    found = [cls] if "reason" in cls.__dict__ and cls is not WireError else []
    for sub in cls.__subclasses__():
        found += _leaves(sub)
    return found


_BY_REASON: Final[dict[str, type[WireError]]] = {cls.reason: cls for cls in _leaves(WireError)}


def status_of(error: WireError) -> grpc.Status:
    """The rich gRPC status that carries ``error`` (pass it to ``context.abort_with_status``)."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    status = status_pb2.Status(code=_code(error.status), message=_bounded(str(error)))
    status.details.add().Pack(info)
    return rpc_status.to_status(status)


def error_from_rpc(error: grpc.RpcError) -> CloisterError:
    """What a failed call means.

    Returns:
        The :class:`WireError` that the peer raised, where it told one; :class:`UnreachableError` where the connection
        itself failed; :class:`InternalError` for anything else. The caller raises it ``from error``.
    """
    code, details = error.code(), _bounded(error.details() or "")
    try:
        status = rpc_status.from_call(error)  # type: ignore[arg-type]  # an RpcError of a call is a Call
    except (ValueError, DecodeError):  # no status, or one that contradicts the call's own: made up, so not believed
        status = None
    for packed in status.details if status is not None else ():
        known = _BY_REASON.get(_reason(packed))
        if known is not None and known.status is code:
            return known(details)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return UnreachableError(details)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:  # gRPC's own: a message above the receiver's limit
        return LimitExceededError(details)
    return InternalError(f"{code.name}: {details}")


def _reason(packed: Packed) -> str:
    """The reason that a detail of a status gives, if it is one of ours."""
    info = error_details_pb2.ErrorInfo()
    try:
        ours = packed.Is(info.DESCRIPTOR) and packed.Unpack(info) and info.domain == DOMAIN
    except DecodeError:
        return ""
    return info.reason if ours else ""


def _bounded(text: str) -> str:
    """The beginning of ``text`` that fits the trailers; what UTF-8 cannot say becomes a question mark."""
    return text[:_MAX_MESSAGE_BYTES].encode(errors="replace")[:_MAX_MESSAGE_BYTES].decode(errors="ignore")


def _code(status: grpc.StatusCode) -> int:
    number: int = code_pb2.Code.Value(status.name)
    return number
