"""What a node gives to its owners at most."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Final

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from protos import node_pb2
from server_side.accounts import Accounts, Limits, Reservation
from server_side.table import OwnerUsage
from wire.errors import BusyError, ConfigError, LimitExceededError

SMALL: Final = Limits(sessions=4, sessions_per_owner=3, bytes_per_owner=100, parameters_per_session=10)
OWNERS: Final = ("ab" * 32, "cd" * 32, "ef" * 32)
ANN, BEN, CAT = OWNERS


def test_the_limits_are_those_of_the_wire() -> None:
    on_the_wire = [field.name for field in node_pb2.Limits.DESCRIPTOR.fields]

    assert [field.name for field in dataclasses.fields(Limits)] == on_the_wire


def test_every_limit_reaches_the_wire_under_its_own_name() -> None:
    names = [field.name for field in dataclasses.fields(Limits)]
    limits = Limits(**{name: number for number, name in enumerate(names, start=1)})

    told = limits.to_proto()

    assert [getattr(told, name) for name in names] == list(range(1, len(names) + 1))


def test_the_largest_limits_fit_the_wire() -> None:
    wide = {"message_bytes", "tensor_bytes", "program_bytes", "parameters_per_session"}
    wide |= {"activation_bytes_per_micro_batch", "bytes_per_owner"}
    largest = {field.name: 2**62 if field.name in wide else 2**32 - 1 for field in dataclasses.fields(Limits)}

    assert dataclasses.asdict(Limits(**largest)) == largest
    assert Limits(**largest).to_proto().bytes_per_owner == 2**62


@pytest.mark.parametrize(
    ("name", "value", "complaint"),
    [
        ("sessions", 0, "limit sessions = 0; set it from 1 to 4294967295"),
        ("sessions", 2**32, "limit sessions = 4294967296; set it from 1 to 4294967295"),
        ("bytes_per_owner", -1, f"limit bytes_per_owner = -1; set it from 1 to {2**62}"),
        ("tensor_bytes", 2**64, f"limit tensor_bytes = {2**64}; set it from 1 to {2**62}"),
    ],
)
def test_a_limit_that_makes_no_sense_is_refused(name: str, value: int, complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Limits(**{name: value})

    assert str(refused.value) == complaint


def test_the_defaults_hold_the_largest_session_with_all_its_micro_batches() -> None:
    limits = Limits()
    adamw_in_float32 = 16 * limits.parameters_per_session
    activations = limits.micro_batches_in_flight * limits.activation_bytes_per_micro_batch

    assert adamw_in_float32 + activations <= limits.bytes_per_owner
    assert limits.tensor_bytes < limits.message_bytes < 2**31  # gRPC's own end
    assert limits.sessions_per_owner < limits.sessions


def test_a_reservation_counts_until_it_is_released() -> None:
    accounts = Accounts(SMALL)

    first = accounts.reserve(ANN, bytes=60, parameters=10)
    accounts.reserve(ANN, bytes=40, parameters=1)
    accounts.reserve(BEN, bytes=100, parameters=2)

    assert accounts.usage(ANN) == OwnerUsage(sessions=2, reserved_bytes=100, parameters=11)
    assert accounts.sessions == 3
    first.release()
    assert accounts.usage(ANN) == OwnerUsage(sessions=1, reserved_bytes=40, parameters=1)
    assert accounts.sessions == 2


def test_releasing_again_gives_nothing_back_twice() -> None:
    accounts = Accounts(SMALL)
    first = accounts.reserve(ANN, bytes=60, parameters=1)
    accounts.reserve(ANN, bytes=40, parameters=1)

    first.release()
    first.release()

    assert accounts.usage(ANN) == OwnerUsage(sessions=1, reserved_bytes=40, parameters=1)


def test_a_reservation_ends_with_its_block_also_when_that_fails() -> None:
    accounts = Accounts(SMALL)

    with contextlib.suppress(ZeroDivisionError), accounts.reserve(ANN, bytes=60, parameters=1) as held:
        assert held.reserved_bytes == 60
        assert accounts.sessions == 1
        _ = 1 / 0

    assert accounts.sessions == 0


def test_T02_a_session_that_never_fits_is_refused_for_good() -> None:
    accounts = Accounts(SMALL)

    with pytest.raises(LimitExceededError, match=r"^a session of 11 parameters; this node takes at most 10$"):
        accounts.reserve(ANN, bytes=1, parameters=11)
    with pytest.raises(LimitExceededError, match=r"^a session of 101 bytes; this node gives an owner at most 100$"):
        accounts.reserve(ANN, bytes=101, parameters=1)

    assert accounts.usage(ANN) == OwnerUsage()


def test_T02_an_owner_at_its_bytes_is_told_to_close_a_session() -> None:
    accounts = Accounts(SMALL)
    first = accounts.reserve(ANN, bytes=60, parameters=1)

    with pytest.raises(BusyError) as refused:
        accounts.reserve(ANN, bytes=41, parameters=1)

    assert str(refused.value) == "you hold 60 of 100 bytes here, this session takes 41; close one"
    first.release()
    assert accounts.reserve(ANN, bytes=41, parameters=1).owner == ANN


def test_T02_an_owner_at_its_sessions_does_not_stop_the_others() -> None:
    accounts = Accounts(SMALL)
    for _ in range(3):
        accounts.reserve(ANN, bytes=1, parameters=1)

    with pytest.raises(BusyError, match=r"^you hold 3 of 3 sessions here; close one$"):
        accounts.reserve(ANN, bytes=1, parameters=1)

    assert accounts.reserve(BEN, bytes=1, parameters=1).owner == BEN


def test_T02_a_full_node_refuses_everyone_without_telling_who_fills_it() -> None:
    accounts = Accounts(SMALL)
    for owner in (ANN, ANN, ANN, BEN):
        accounts.reserve(owner, bytes=1, parameters=1)

    with pytest.raises(BusyError, match=r"^this node serves 4 of 4 sessions; try later or elsewhere$"):
        accounts.reserve(CAT, bytes=1, parameters=1)


def test_negative_sizes_are_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="sizes of a session: -1 bytes, 1 parameters"):
        Accounts(SMALL).reserve(ANN, bytes=-1, parameters=1)


def test_threads_that_all_reserve_at_once_never_get_more_than_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    accounts, start, check = Accounts(SMALL), Barrier(8), Accounts._check_now

    def check_slowly(self: Accounts, owner: str, wanted: int) -> None:
        check(self, owner, wanted)
        time.sleep(0.002)  # long enough for another thread to check too, were there no lock

    monkeypatch.setattr(Accounts, "_check_now", check_slowly)

    def attempt(owner: str) -> Reservation | None:
        start.wait()
        try:
            return accounts.reserve(owner, bytes=30, parameters=1)
        except BusyError:
            return None

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            held = [each for each in pool.map(attempt, itertools.islice(itertools.cycle(OWNERS), 8)) if each]

        assert len(held) == accounts.sessions == 4
        for each in held:
            each.release()
        assert accounts.sessions == 0


class AnyOrder(RuleBasedStateMachine):
    """Reserving and releasing, in any order, against the plainest model of it: a list."""

    reservations: Bundle[Reservation] = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.accounts = Accounts(SMALL)
        self.held: list[Reservation] = []

    @rule(target=reservations, owner=st.sampled_from(OWNERS), size=st.integers(0, 120), parameters=st.integers(0, 12))
    def reserve(self, owner: str, size: int, parameters: int) -> Reservation:
        mine = [each.reserved_bytes for each in self.held if each.owner == owner]
        ever = size <= SMALL.bytes_per_owner and parameters <= SMALL.parameters_per_session
        now = len(mine) < SMALL.sessions_per_owner and sum(mine) + size <= SMALL.bytes_per_owner
        now = now and len(self.held) < SMALL.sessions
        if ever and now:
            self.held.append(self.accounts.reserve(owner, size, parameters))
            return self.held[-1]
        with pytest.raises(BusyError if ever else LimitExceededError):
            self.accounts.reserve(owner, size, parameters)
        return Reservation(self.accounts, owner, size, parameters)  # never taken: releasing it must change nothing

    @rule(each=reservations)
    def release_and_keep_the_handle(self, each: Reservation) -> None:
        each.release()
        self.held = [other for other in self.held if other is not each]

    @rule(each=consumes(reservations))
    def leave_the_block(self, each: Reservation) -> None:
        with each:
            pass
        self.held = [other for other in self.held if other is not each]

    @invariant()
    def nobody_is_above_a_limit(self) -> None:
        usages = [self.accounts.usage(owner) for owner in OWNERS]
        assert sum(usage.sessions for usage in usages) == self.accounts.sessions == len(self.held) <= SMALL.sessions
        for owner, usage in zip(OWNERS, usages, strict=True):
            assert usage.reserved_bytes == sum(each.reserved_bytes for each in self.held if each.owner == owner)
            assert usage.sessions <= SMALL.sessions_per_owner
            assert usage.reserved_bytes <= SMALL.bytes_per_owner

    def teardown(self) -> None:
        for each in self.held:
            each.release()
        assert self.accounts.sessions == 0
        assert [self.accounts.usage(owner) for owner in OWNERS] == [OwnerUsage()] * 3
        assert self.accounts._held == {}


test_any_interleaving_stays_within_the_limits_and_ends_at_zero = AnyOrder.TestCase
