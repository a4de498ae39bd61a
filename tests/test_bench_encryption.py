"""``bench encryption`` counts what it says: steps, bytes, ratios. How fast anything is, no test asserts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import TensorDataset

from bench import encrypted_runs, encryption
from bench.encrypted_runs import CLEAR, ENC_G, TO_OWNER, Beats, Cost, Price, Workplace
from bench.encryption import MM, SPLIT_WAYS, SUCCESSOR, Accuracy, Beside, Measured
from bench.published import Published, Shape, measured
from privacy.accounting import epsilon_of

RECORDS, BATCH = 64, 16
CIPHERTEXT = 2048 * 54 // 8  # bytes of one polynomial
PARAMETERS = 4 * (256 * 5 + 5)


@pytest.fixture(scope="module")
def place() -> Iterator[Workplace]:
    with Workplace.opened() as found:
        yield found


def beats(records: int = RECORDS) -> Beats:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(records) % 5
    waves = torch.sin(torch.linspace(0, 6, 128) * (1 + labels[:, None])) + 0.1 * torch.randn(
        records, 128, generator=generator
    )
    made = TensorDataset(waves[:, None], labels)
    return Beats(made, made)


def cost(variant: str, batch: int, *, steps: int, of: int, wall_s: float, cpu_s: float) -> Cost:
    return Cost(variant, batch, steps, of, wall_s, cpu_s / 2, cpu_s / 4, cpu_s / 4, up=20e6, down=5e6)


MEASURED = Measured(
    records=13245,
    costs=(
        cost(TO_OWNER, 2048, steps=7, of=7, wall_s=2.0, cpu_s=2.0),
        cost(TO_OWNER, 4, steps=1656, of=3312, wall_s=35.0, cpu_s=40.0),
    ),
    socket_mb=26.0,
    price=Price(2048, 0.1, 0.02, 0.001),
    accuracies=(Accuracy("by beat", (95.0, 96.0), (95.05, 95.8)),),
    private={8.0: 90.0},
    beside=(Beside(SPLIT_WAYS, 4, 3312, Published(12, 9.0, 3.0, 12.0, 10**9, 1e-3)),),
)


def test_a_part_of_an_epoch_is_scaled_up_to_all_of_it() -> None:
    half = MEASURED.costs[1]

    assert half.cpu_s == pytest.approx(80.0)
    assert half.megabytes == pytest.approx(50.0)
    assert MEASURED.beside[0].cpu_s == pytest.approx(3312.0)


def test_the_chapter_compares_what_was_measured_with_what_was_wanted() -> None:
    found: dict[str, Any] = {f.claim: (f.measured, f.met) for f in encryption.chapter(MEASURED).findings}

    (wall,) = [v for claim, v in found.items() if claim.endswith("batch 2048, W to the owner, wall")]
    assert wall == (2.0, True)
    assert found["The same at batch 4, wall"] == (pytest.approx(70.0), False)
    (ratio,) = [v for claim, v in found.items() if claim.startswith("CPU-seconds of an epoch of Split Ways")]
    assert ratio == (pytest.approx(1656.0), True)
    (points,) = [v for claim, v in found.items() if claim.startswith("Split by beat")]
    assert points == (pytest.approx(0.2), False)
    (honest,) = [v for claim, v in found.items() if claim.startswith("CPU-seconds to encrypt 2048 rows")]
    assert honest == (pytest.approx(120.0), None)


def test_the_chapter_says_how_much_of_an_epoch_was_measured() -> None:
    told = encryption.chapter(MEASURED)

    costs, beside = (table.rows for table in told.tables[:2])
    assert costs[1][:4] == ("4", "W to the owner", "1,656 of 3,312 steps", "70.00")
    assert beside[0][1:4] == ("4", "12 of 3,312 batches", "3,312.0")
    assert "not compute" in told.what


@pytest.mark.parametrize(
    "shape",
    [MM, SUCCESSOR, Shape("each scalar", 4096, (40, 20, 20), 21, batched=False)],
    ids=["mm", "successor", "each scalar"],
)
def test_a_published_shape_computes_the_layer_in_a_process_of_its_own(shape: Shape) -> None:
    found = measured(shape, 2, 1)

    assert found.batches == 1
    assert found.compute_s > 0
    assert found.carry_s > 0
    assert found.nbytes > 256 * 4096
    assert found.error < 1.0 or not shape.batched  # rescaled by 20 bits for 21, it errs by more than noise


def test_the_cost_of_an_epoch_counts_its_steps_and_bytes(place: Workplace) -> None:
    records = beats().train

    whole = place.cost(TO_OWNER, records, BATCH, epochs=1)
    part = place.cost(ENC_G, records, BATCH, epochs=1, most=2)
    clear = place.cost(CLEAR, records, BATCH, epochs=1)

    assert (whole.steps, whole.of) == (4, 4)
    assert whole.up == 4 * (2 * (CIPHERTEXT + 64) + PARAMETERS)  # two ciphertexts hold 16 rows of 256 features
    assert whole.down == 4 * (5 * 2 * CIPHERTEXT + PARAMETERS)
    assert whole.owner_s > 0
    assert (part.steps, part.of) == (2, 4)
    assert part.megabytes > whole.megabytes
    assert clear.up == 4 * 4 * BATCH * (256 + 5)
    assert not clear.workers_s


def test_bytes_on_the_socket_are_those_of_the_payload_and_little_more(place: Workplace) -> None:
    records = beats().train

    payload = place.cost(TO_OWNER, records, BATCH, epochs=1)
    socket = place.socket_bytes(records, BATCH)

    assert 1.0 < socket / (payload.up + payload.down) < 1.05


def test_of_one_seed_encryption_changes_next_to_nothing(place: Workplace) -> None:
    model: dict[str, float] = {v: place.accuracy(v, beats(), BATCH, 3, seed=1) for v in (CLEAR, TO_OWNER)}

    assert model[CLEAR] == model[TO_OWNER]
    assert model[CLEAR] > 20.0


def test_joint_dp_sgd_spends_what_was_asked_for(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encrypted_runs, "PRIVATE_BATCH", 32)

    percent = place.private_accuracy(beats(256), 2.0, 2)

    assert 0 <= percent <= 100
    events = [entry.event for entry in place._ledger.entries("beats, ε = 2.0")]
    assert len(events) == 2
    assert 1.9 < epsilon_of(events, encrypted_runs.DELTA) <= 2.0


def test_the_owner_pays_more_than_the_layer_costs() -> None:
    paid = encrypted_runs.price(16)

    assert paid.encrypt_s + paid.decrypt_s > paid.layer_s > 0


def test_without_real_beats_synthetic_ones_take_their_place() -> None:
    made = encrypted_runs.load("record", None)

    assert made.train.tensors[0].shape[1:] == (1, 128)
    assert len(made.test) > 0
    assert math.isfinite(float(encrypted_runs.network(0)(made.train.tensors[0][:2]).detach().sum()))
