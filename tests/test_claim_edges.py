"""Ways to a finite ε that would not hold: each is refused before anything leaves, so no node is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import create_engine, text
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, TensorDataset, WeightedRandomSampler

import cloister
from client_side.records import data_set_of
from client_side.releases import Releases
from privacy.accounting import RandomizedResponse, Relation
from privacy.claims import claim_of
from privacy.guard import Guard, Situation
from privacy.ledger import Entry
from privacy.policy import Frozen
from privacy.tables import Records
from wire.errors import BudgetSpentError, ConfigError, LedgerError, ReleaseRefusedError

FRESH = cloister.Policy(
    activations=cloister.Rows(clip=1.0, noise=20.0, once=False),
    gradients=cloister.GaussianRows(clip=1.0, noise=20.0),
    head=Frozen(),
    epsilon=50.0,
)
MOMENTS = cloister.Policy(activations=cloister.Moments(rows=60), classes=3, epsilon=1.0)
DATA = TensorDataset(torch.randn(60, 6, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[cloister.Ledger]:
    with contextlib.closing(cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as found:
        yield found


def front(*layers: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), *layers, cloister.UnitRows()).requires_grad_(False)


def claimed(
    policy: cloister.Policy,
    ledger: cloister.Ledger,
    *layers: nn.Module,
    loader: DataLoader[Any] | None = None,
    units: torch.Tensor | None = None,
    data_set: str | None = "sixty",
) -> Guard:
    """A guard after a trainer's way to its first step; what it refuses is raised."""
    head = nn.Linear(4, 3).requires_grad_(False) if isinstance(policy.gradients, cloister.GaussianRows) else None
    cut = cloister.Cut(
        front=front(*layers), middle=nn.Linear(4, 4 if head else 3), head=head, example=torch.zeros(4, 6)
    )
    guard = Guard(policy, ledger)
    releases = Releases(cut, guard, run="r", data_set=data_set, units=units, seed=0)
    releases.loader(loader or DataLoader(DATA, 10, shuffle=True), None, None)
    return guard


def test_what_is_right_is_claimed(ledger: cloister.Ledger) -> None:
    assert claimed(FRESH, ledger).claim is not None
    found = claimed(MOMENTS, ledger, data_set="others").claim
    assert found is not None
    assert found.spent.epsilon == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["sixty-2", None])
def test_T11_a_new_name_is_no_new_budget(name: str | None, ledger: cloister.Ledger) -> None:
    claimed(MOMENTS, ledger)
    with pytest.raises(ConfigError, match=r'already, as sixty: .* data_set = "sixty"'):
        claimed(MOMENTS, ledger, data_set=name)
    others = TensorDataset(DATA.tensors[0] + 1, DATA.tensors[1])

    assert claimed(MOMENTS, ledger, data_set=name, loader=DataLoader(others, 10)).claim is not None
    assert len(ledger.data_sets()) == 2


def test_T11_records_that_are_evaluated_through_the_node_are_told_by_their_own_name(ledger: cloister.Ledger) -> None:
    claimed(MOMENTS, ledger)
    digest = data_set_of(DataLoader(DATA, 10), read=False)
    Guard(cloister.CLEAR, ledger).open_inference(digest, "later")

    assert [entry.kind for entry in ledger.entries("sixty")][-1] == "inference"


def test_units_are_a_tensor(ledger: cloister.Ledger) -> None:
    policy = dataclasses.replace(MOMENTS, unit="patient")
    with pytest.raises(ConfigError, match="a list; give a torch tensor"):
        claimed(policy, ledger, units=[1] * 60)  # type: ignore[arg-type]


def test_units_without_a_name_are_not_passed_over_in_silence(ledger: cloister.Ledger) -> None:
    with pytest.raises(ConfigError, match='unit = "patient"'):
        claimed(MOMENTS, ledger, units=torch.arange(60) // 3)


def test_labels_are_not_included_where_nothing_includes_them() -> None:
    with pytest.raises(ConfigError, match="only aggregate and moments include them"):
        cloister.Policy(activations=cloister.Rows(clip=1.0, noise=20.0), labels=cloister.Included(), epsilon=8.0)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(DATA, batch_sampler=[[0] * 50] * 12),
        DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA, replacement=True, num_samples=600), 50, False)),
        DataLoader(DATA, 50, sampler=WeightedRandomSampler([1.0] * 59 + [1e6], 600)),
        DataLoader(DATA, 60, sampler=RandomSampler(DATA, replacement=True)),
    ],
    ids=["batches", "batches of a sampler", "weights", "replacement"],
)
def test_a_loader_that_may_repeat_a_record_is_refused(loader: DataLoader[Any], ledger: cloister.Ledger) -> None:
    with pytest.raises(ReleaseRefusedError, match="more than once in an epoch"):
        claimed(FRESH, ledger, loader=loader)


@pytest.mark.parametrize("policy", [FRESH, MOMENTS], ids=["anew", "table"])
def test_a_front_that_mixes_records_is_refused(policy: cloister.Policy, ledger: cloister.Ledger) -> None:
    with pytest.raises(ReleaseRefusedError, match="mixes the records of a batch"):
        claimed(policy, ledger, nn.BatchNorm1d(4, track_running_stats=False))
    with pytest.raises(ReleaseRefusedError, match="mixes the records of a batch"):
        claimed(policy, ledger, cloister.frozen(nn.BatchNorm1d(4, track_running_stats=False)))


def test_a_front_that_would_learn_statistics_is_refused_unless_it_is_frozen(ledger: cloister.Ledger) -> None:
    with pytest.raises(ReleaseRefusedError, match="mixes the records of a batch"):
        claimed(FRESH, ledger, nn.BatchNorm1d(4))
    assert claimed(FRESH, ledger, cloister.frozen(nn.BatchNorm1d(4))).claim is not None
    assert claimed(FRESH, ledger, nn.Dropout(0.5), nn.GroupNorm(2, 4)).claim is not None


def test_every_pass_that_is_begun_is_paid_for(ledger: cloister.Ledger) -> None:
    guard = claimed(FRESH, ledger)
    for _ in range(3):  # begun, interrupted, begun again: whoever came before may come again
        guard.begin_pass(0)

    assert len(ledger.entries("sixty")) == 3 * 2


class Rowwise(Dataset[tuple[torch.Tensor, ...]]):
    def __len__(self) -> int:
        return len(DATA)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        made: tuple[torch.Tensor, ...] = DATA[index]
        return made


def test_T11_a_data_set_has_one_name_however_it_is_read() -> None:
    loaders = [DataLoader(DATA, 10), DataLoader(Rowwise(), 10), DataLoader(Rowwise(), 7, shuffle=True)]

    names = {data_set_of(loader, read=True) for loader in loaders}

    assert len(names) == 1
    other = TensorDataset(DATA.tensors[0] + 1, DATA.tensors[1])
    assert data_set_of(DataLoader(other, 10), read=True) not in names


def test_evaluation_in_the_clear_goes_with_no_claim(ledger: cloister.Ledger) -> None:
    guard = Guard(dataclasses.replace(MOMENTS, inference=cloister.Clear()), ledger)
    with pytest.raises(ReleaseRefusedError, match="evaluation and prediction send activations in the clear"):
        guard.open_inference("sixty", "r")


@pytest.mark.parametrize("units", [torch.arange(3), torch.rand(60), torch.arange(60).reshape(30, 2)])
@pytest.mark.parametrize("policy", [FRESH, MOMENTS], ids=["anew", "table"])
def test_units_are_one_integer_for_each_record(
    policy: cloister.Policy, units: torch.Tensor, ledger: cloister.Ledger
) -> None:
    with pytest.raises(ConfigError, match="one integer for each of them"):
        claimed(dataclasses.replace(policy, unit="patient", records_per_unit=5), ledger, units=units)


def test_a_table_that_is_refused_is_not_paid_for(ledger: cloister.Ledger) -> None:
    guard = claimed(FRESH, ledger)
    guard = Guard(MOMENTS, ledger)
    situation = Situation(
        data_set="sixty", run="r", vanilla=True, front_learns=False, head_learns=False, once_an_epoch=True
    )
    guard.begin(situation)
    with pytest.raises(ConfigError, match="UnitRows"):
        guard.table(Records(torch.ones(60, 4) * 9, torch.arange(60) % 3))

    assert ledger.entries("sixty") == []


def test_T11_a_ledger_with_an_entry_less_is_refused_when_it_is_opened(tmp_path: Path, ledger: cloister.Ledger) -> None:
    Guard(cloister.CLEAR, ledger).begin(
        Situation(data_set="sixty", run="r", vanilla=True, front_learns=True, head_learns=False, once_an_epoch=True)
    )
    claimed(MOMENTS, ledger, data_set="others")
    engine = create_engine(f"sqlite:///{tmp_path / 'privacy.sqlite'}")
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM privacy_releases WHERE number = 1"))
    engine.dispose()

    with pytest.raises(LedgerError):
        cloister.Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")


def test_a_delta_that_lets_one_record_be_shown_is_refused(ledger: cloister.Ledger) -> None:
    with pytest.raises(ConfigError, match=r"delta = 0\.02"):
        claimed(dataclasses.replace(MOMENTS, delta=0.02), ledger)


@pytest.mark.parametrize(
    ("noise", "words"), [(0.05, "e^"), (3.0, "times as likely")], ids=["beyond floats", "in words"]
)
def test_a_claim_is_printed_for_any_epsilon_and_never_rounded_down(
    noise: float, words: str, ledger: cloister.Ledger
) -> None:
    rows = cloister.Policy(
        activations=cloister.Rows(clip=1.0, noise=noise), labels=cloister.RandomizedLabels(epsilon=0.1), classes=3,
        epsilon=1e6,
    )  # fmt: skip
    guard = claimed(rows, ledger)
    claim = claim_of(ledger.entries("sixty"), delta=1.4e-5, relation=Relation.REPLACE_ONE)

    assert guard.claim is not None
    assert words in claim.sentence
    assert "δ = 1.4e-05" in claim.sentence
    told = float(claim.sentence.split("ε = ")[1].split(",")[0])
    assert told >= claim.spent.epsilon * (1 - 1e-5)
    assert math.isfinite(told)


@pytest.mark.parametrize(
    ("epsilon", "words"),
    [(1e-7, "1.00096 times"), (0.05, "1.053 times"), (1.0, "2.72 times")],
)
def test_what_a_small_epsilon_allows_is_told_and_never_as_nothing(epsilon: float, words: str) -> None:
    event = RandomizedResponse(epsilon=epsilon, classes=2)
    entry = Entry(1, "a", "r", 0, "labels", "randomized_response", "record", event, "")

    assert f"more than {words} as likely" in claim_of([entry], delta=1e-5, relation=Relation.REPLACE_ONE).sentence


def test_a_front_that_is_unfrozen_later_stops_the_run(ledger: cloister.Ledger) -> None:
    cut = cloister.Cut(front=front(), middle=nn.Linear(4, 3), example=torch.zeros(4, 6))
    releases = Releases(cut, Guard(MOMENTS, ledger), run="r", data_set="sixty", units=None, seed=0)
    releases.loader(DataLoader(DATA, 10), None, None)
    releases.check_learning()
    cut.front.requires_grad_(True)

    with pytest.raises(ReleaseRefusedError, match="frozen or unfrozen since"):
        releases.check_learning()


def test_a_second_data_set_under_the_same_name_is_refused(ledger: cloister.Ledger) -> None:
    cut = cloister.Cut(front=front(), middle=nn.Linear(4, 3), example=torch.zeros(4, 6))
    releases = Releases(cut, Guard(MOMENTS, ledger), run="r", data_set="sixty", units=None, seed=0)
    releases.loader(DataLoader(DATA, 10), None, None)
    other = TensorDataset(DATA.tensors[0] + 1, DATA.tensors[1])

    with pytest.raises(ConfigError, match="a new trainer for other data"):
        releases.loader(DataLoader(other, 10), None, None)


@pytest.mark.parametrize(
    "values",
    [
        {"activations": {"treatment": ["moments"]}},
        {"activations": {"treatment": "rows", "clip": True}},
        {"activations": {"treatment": "rows", "clip": 10**400}},
        {"activations": {"treatment": "rows", "clip": 1.0, "noise": 1e-160}},
        {"activations": {"treatment": "moments", "rows": 2.5}, "classes": 3},
        {"activations": {"treatment": "aggregate", "clip": 1.0, "rate": 1e-300, "releases": 5}, "classes": 3},
        {"activations": "moments", "classes": 3, "epsilon": 1e308},
    ],
)
def test_odd_numbers_are_refused_in_words(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        cloister.Policy.from_json(values)


def test_two_runs_on_one_name_share_its_budget(ledger: cloister.Ledger) -> None:
    claimed(MOMENTS, ledger)

    with pytest.raises(BudgetSpentError):
        claimed(MOMENTS, ledger)
