"""What one node gives to all its owners at most, and what each of them holds now.

A reservation is taken before anything is allocated for a session and given back when the session has let go of it, so
that the sums here are upper bounds of what is held (THREATS T02). They live in memory: a node that restarts holds
nothing.
"""

from __future__ import annotations

import dataclasses
import threading
from types import TracebackType
from typing import Final, Self

from protos import node_pb2
from server_side.table import OwnerUsage
from wire.codec import MAX_TENSOR_BYTES
from wire.errors import BusyError, ConfigError, LimitExceededError

__all__ = ["Accounts", "Limits", "Reservation"]

MESSAGE_BYTES: Final = MAX_TENSOR_BYTES + 16 * 2**20  # the largest tensor, with labels and small skips beside it
PROGRAM_BYTES: Final = 16 * 2**20  # a hundred times what a Llama's four decoder layers take
PROGRAM_OPERATIONS: Final = 100_000  # a 100-layer transformer has about 10,000
PARAMETERS_PER_SESSION: Final = 2**31  # in float32 under AdamW, with gradients, 32 GiB: what a 40 GB GPU trains
ACTIVATION_BYTES_PER_MICRO_BATCH: Final = 4 * 2**30  # a ResNet-50 at 224 x 224 and 32 rows keeps about 3 GiB
MICRO_BATCHES_IN_FLIGHT: Final = 8  # more than 4 gained nothing on a 50 ms link; each one keeps its activations
SESSIONS_PER_OWNER: Final = 64  # half of SESSIONS: no single owner shuts the others out
BYTES_PER_OWNER: Final = 64 * 2**30  # the largest session (32 GiB) with eight micro-batches of activations (32 GiB)
SESSIONS: Final = 128  # each has a worker thread and a stream; as many fit in a gRPC server's thread pool

_LARGEST_UINT32: Final = 2**32 - 1
_LARGEST: Final = 2**62  # what the session table counts to; less than the wire's uint64


@dataclasses.dataclass(frozen=True, slots=True)
class Limits:
    """What a node accepts at most; the fields are those of ``protos/node.proto``'s ``Limits``.

    Raises:
        ConfigError: A limit is zero, negative or more than its field on the wire holds.
    """

    message_bytes: int = MESSAGE_BYTES
    tensor_bytes: int = MAX_TENSOR_BYTES
    program_bytes: int = PROGRAM_BYTES
    program_operations: int = PROGRAM_OPERATIONS
    parameters_per_session: int = PARAMETERS_PER_SESSION
    activation_bytes_per_micro_batch: int = ACTIVATION_BYTES_PER_MICRO_BATCH
    micro_batches_in_flight: int = MICRO_BATCHES_IN_FLIGHT
    sessions_per_owner: int = SESSIONS_PER_OWNER
    bytes_per_owner: int = BYTES_PER_OWNER
    sessions: int = SESSIONS

    def __post_init__(self) -> None:
        for field in node_pb2.Limits.DESCRIPTOR.fields:
            value: int = getattr(self, field.name)
            largest = _LARGEST_UINT32 if field.type == field.TYPE_UINT32 else _LARGEST
            if not 1 <= value <= largest:
                raise ConfigError(f"limit {field.name} = {value}; set it from 1 to {largest}")

    def to_proto(self) -> node_pb2.Limits:
        """As ``Describe`` tells it to owners."""
        return node_pb2.Limits(**dataclasses.asdict(self))


class Reservation:
    """One session's share of a node: to :meth:`release` when the session is gone, or for a ``with`` statement."""

    __slots__ = ("_accounts", "owner", "parameters", "reserved_bytes")

    def __init__(self, accounts: Accounts, owner: str, reserved_bytes: int, parameters: int) -> None:
        self._accounts = accounts
        self.owner: Final = owner
        self.reserved_bytes: Final = reserved_bytes
        self.parameters: Final = parameters

    def release(self) -> None:
        """Gives the share back; doing so again changes nothing."""
        self._accounts._release(self)  # noqa: SLF001 - the two classes are one thing with two handles

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class Accounts:
    """Who holds how much of this node now. Safe to use from any thread.

    The law: at any moment no owner is above ``sessions_per_owner`` or ``bytes_per_owner``, all owners together are not
    above ``sessions``, and when every reservation is released, nothing is held.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held: dict[str, set[Reservation]] = {}  # an owner without reservations has no entry
        self._lock = threading.Lock()

    def reserve(self, owner: str, bytes: int, parameters: int) -> Reservation:  # noqa: A002 - the wire's word
        """Takes one session's share.

        Args:
            owner: The owner's certificate fingerprint.
            bytes: An upper bound of the memory that the session may hold.
            parameters: Elements of all its parameters.

        Raises:
            LimitExceededError: It is larger than this node ever gives.
            BusyError: It does not fit beside what is held now.
            ValueError: A size is negative: a defect of the caller, who counts them.
        """
        if bytes < 0 or parameters < 0:
            raise ValueError(f"sizes of a session: {bytes} bytes, {parameters} parameters")
        self._check_ever(bytes, parameters)
        reservation = Reservation(self, owner, bytes, parameters)
        with self._lock:
            self._check_now(owner, bytes)
            self._held.setdefault(owner, set()).add(reservation)
        return reservation

    def usage(self, owner: str) -> OwnerUsage:
        """What one owner holds now."""
        with self._lock:
            return self._usage(owner)

    @property
    def sessions(self) -> int:
        """Reservations of all owners together."""
        with self._lock:
            return self._count()

    def _check_ever(self, wanted: int, parameters: int) -> None:
        if parameters > self._limits.parameters_per_session:
            raise LimitExceededError(
                f"a session of {parameters} parameters; this node takes at most {self._limits.parameters_per_session}"
            )
        if wanted > self._limits.bytes_per_owner:
            raise LimitExceededError(
                f"a session of {wanted} bytes; this node gives an owner at most {self._limits.bytes_per_owner}"
            )

    def _check_now(self, owner: str, wanted: int) -> None:
        limits, held, everyone = self._limits, self._usage(owner), self._count()
        if held.sessions >= limits.sessions_per_owner:
            raise BusyError(f"you hold {held.sessions} of {limits.sessions_per_owner} sessions here; close one")
        if held.reserved_bytes + wanted > limits.bytes_per_owner:
            raise BusyError(
                f"you hold {held.reserved_bytes} of {limits.bytes_per_owner} bytes here, this session takes {wanted}; "
                "close one"
            )
        if everyone >= limits.sessions:
            raise BusyError(f"this node serves {everyone} of {limits.sessions} sessions; try later or elsewhere")

    def _usage(self, owner: str) -> OwnerUsage:
        held = self._held.get(owner, ())
        return OwnerUsage(
            sessions=len(held),
            reserved_bytes=sum(each.reserved_bytes for each in held),
            parameters=sum(each.parameters for each in held),
        )

    def _count(self) -> int:
        return sum(len(held) for held in self._held.values())

    def _release(self, reservation: Reservation) -> None:
        with self._lock:
            held = self._held.get(reservation.owner, set())
            held.discard(reservation)
            if not held:
                self._held.pop(reservation.owner, None)
