"""Policies as data, and the claims that are refused: each of the wrong ones that the field prints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from privacy.accounting import Relation, epsilon_of, sampled_noise
from privacy.claims import claim_of
from privacy.guard import Guard, Released, Situation, fresh_releases
from privacy.ledger import Budget, Ledger
from privacy.policy import (
    CLEAR,
    Aggregate,
    Clear,
    DpSgd,
    GaussianRows,
    Included,
    Moments,
    Never,
    Policy,
    RandomizedLabels,
    Rows,
    holes,
)
from privacy.tables import Records, make_table, plan_table
from wire.errors import ConfigError, LedgerError, ReleaseRefusedError

ROWS = Rows(clip=1.0, noise=7.46)
ANEW = Policy(
    activations=Rows(clip=1.0, noise=20.0, once=False), gradients=GaussianRows(clip=1.0, noise=20.0), epsilon=50.0
)
SAFE: dict[str, Any] = {"epsilon": 8.0, "classes": 10}


@pytest.fixture
def ledger(tmp_path: Path) -> Any:
    with contextlib.closing(Ledger(f"sqlite:///{tmp_path / 'privacy.sqlite'}")) as found:
        yield found


def situation(**changes: Any) -> Situation:
    settings: dict[str, Any] = {
        "data_set": "data",
        "run": "run",
        "vanilla": True,
        "front_learns": False,
        "head_learns": False,
        "once_an_epoch": True,
        **changes,
    }
    return Situation(**settings)


POLICIES = [
    CLEAR,
    Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), **SAFE),
    Policy(
        activations=Rows(clip=2.0, noise=3.0, once=False),
        gradients=GaussianRows(clip=1.0, noise=2.0),
        head=DpSgd(clip=1.0, noise=2.0),
    ),
    Policy(activations=Aggregate(clip=1.0, rate=0.1, releases=10), labels=Included(), **SAFE),
    Policy(activations=Moments(), labels=Included(), relation=Relation.ADD_REMOVE, unit="patient", **SAFE),
]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_comes_back_from_plain_data(policy: Policy) -> None:
    assert Policy.from_json(policy.to_json()) == policy


def test_a_treatment_is_named_alone_or_with_its_numbers() -> None:
    short = Policy.from_json({"activations": "moments", "classes": 10, "epsilon": 1.0})
    table = Policy.from_json(
        {"activations": {"treatment": "moments", "second_weight": 0.5}, "classes": 10, "epsilon": 1}
    )

    assert (short.activations, short.labels) == (Moments(), Included())
    assert table.activations == Moments(second_weight=0.5)
    assert Policy.from_json({"activations": "clear"}) == CLEAR


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "privacy.activations is missing"),
        ({"activations": "noise"}, "one of clear, rows, aggregate, moments"),
        ({"activations": "rows"}, "rows also needs one of clip"),
        ({"activations": {"treatment": "rows", "clip": 1, "sigma": 2}}, "privacy.activations.sigma: rows takes"),
        ({"activations": {"treatment": "rows", "clip": "1"}}, "privacy.activations.clip = '1': a number"),
        ({"activations": {"treatment": "rows", "clip": -1.0}}, "rows: clip = -1.0; above 0"),
        ({"activations": "clear", "relation": "neighbour"}, "replace_one or add_remove"),
        ({"activations": "clear", "epsilon": 0}, "epsilon = 0.0"),
        ({"activations": "clear", "delta": True}, "privacy.delta = True: a number"),
        ({"activations": "clear", "colour": "red"}, "privacy.colour is no such key"),
        ({"activations": "moments", "epsilon": 1.0}, "say how many classes there are"),
        ({"activations": "clear", "records_per_unit": 3}, "1 where unit"),
    ],
)
def test_what_is_no_policy_is_refused_in_words(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Policy.from_json(values)


def test_T10_nobody_but_the_guard_makes_what_may_leave() -> None:
    with pytest.raises(ReleaseRefusedError, match="only the release guard"):
        Released(torch.ones(1), "activations", object())


def test_T10_nothing_leaves_before_the_run_has_begun(ledger: Ledger) -> None:
    guard = Guard(Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), **SAFE), ledger)
    with pytest.raises(ReleaseRefusedError, match="has not begun"):
        guard.table(Records(torch.ones(4, 3), torch.arange(4)))


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_T10_a_policy_without_a_ledger_is_refused(policy: Policy) -> None:
    with pytest.raises(ConfigError, match="needs a ledger"):
        Guard(policy, None)


def test_T10_what_the_policy_keeps_does_not_leave(ledger: Ledger) -> None:
    guard = Guard(Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), epsilon=50.0, classes=10), ledger)
    guard.begin(situation())
    with pytest.raises(ReleaseRefusedError, match="activations leave in a table"):
        guard.activations([torch.ones(2, 3)])
    with pytest.raises(ReleaseRefusedError, match="labels leave in a table, randomized once"):
        guard.labels(torch.ones(2))
    with pytest.raises(ReleaseRefusedError, match="stay at home"):
        guard.inference([torch.ones(2, 3)])
    with pytest.raises(ReleaseRefusedError, match="output gradients leave only where a table was trained"):
        guard.gradients([torch.ones(2, 3)])
    with pytest.raises(ReleaseRefusedError, match="no table was released"):
        guard.rows(torch.arange(2))


# --- wrong claims, by their numbers in the documentation


def test_wrong_claim_1_noise_on_rows_that_the_node_sees_is_not_amplified() -> None:
    # n = 1,437 in batches of 64 over 15 epochs: billed as secret sampling this noise would claim ε = 6.
    sigma = sampled_noise(epsilon=6.0, delta=1e-5, rate=64 / 1437, steps=15 * 23, relation=Relation.ADD_REMOVE)
    policy = Policy(activations=Rows(clip=1.0, noise=sigma, once=False), gradients=Clear())
    released = fresh_releases(policy, epochs=15)

    assert epsilon_of([r.event for r in released], 1e-5, Relation.REPLACE_ONE) > 60


@pytest.mark.parametrize(
    "activations",
    [ROWS, Rows(clip=1.0, noise=9.0, once=False), Moments(), Aggregate(clip=1.0, rate=0.1, releases=5)],
)
def test_wrong_claim_2_no_epsilon_where_the_front_trains_without_dp(activations: Any, ledger: Ledger) -> None:
    policy = Policy(activations=activations, labels=RandomizedLabels(epsilon=1.0), **SAFE)
    with pytest.raises(ReleaseRefusedError, match="the front trains on the data without dp_sgd"):
        Guard(policy, ledger).begin(situation(front_learns=True))


@pytest.mark.parametrize("policy", POLICIES[2:3])
def test_wrong_claim_3_replacing_a_record_moves_twice_the_clip(policy: Policy) -> None:
    for release in fresh_releases(policy):
        assert release.event.sensitivity_replace == 2 * release.event.sensitivity  # type: ignore[union-attr]  # Gaussians


def test_wrong_claim_4_a_run_is_billed_by_all_of_its_epochs(ledger: Ledger) -> None:
    policy = Policy(
        activations=Rows(clip=1.0, noise=20.0, once=False),
        gradients=GaussianRows(clip=1.0, noise=20.0),
        epsilon=8.0,
    )
    guard = Guard(policy, ledger)
    guard.begin(situation(vanilla=False))
    assert [guard.begin_pass(step) for step in (0, 12, 24)] == [True, True, True]
    expected = epsilon_of([r.event for r in fresh_releases(policy, epochs=3)], policy.delta, policy.relation)
    assert ledger.spent("data", delta=policy.delta).epsilon == pytest.approx(expected)


def test_wrong_claim_4_a_loader_that_may_repeat_records_is_refused(ledger: Ledger) -> None:
    with pytest.raises(ReleaseRefusedError, match="more than once in an epoch"):
        Guard(ANEW, ledger).begin(situation(vanilla=False, once_an_epoch=False))


@pytest.mark.parametrize("gradients", [Clear(), Included()])
def test_wrong_claim_5_the_u_shape_alone_hides_no_label(gradients: Any, ledger: Ledger) -> None:
    policy = Policy(activations=ROWS, labels=Never(), gradients=gradients, **SAFE)
    with pytest.raises(ReleaseRefusedError, match="output gradients"):
        Guard(policy, ledger).begin(situation(vanilla=False))


def test_wrong_claim_5_a_head_that_learns_the_labels_tells_them_later(ledger: Ledger) -> None:
    policy = Policy(activations=ROWS, gradients=GaussianRows(clip=1.0, noise=9.0), **SAFE)
    with pytest.raises(ReleaseRefusedError, match="the head trains on the labels without dp_sgd"):
        Guard(policy, ledger).begin(situation(vanilla=False, head_learns=True))


def test_wrong_claim_5_private_evaluation_counts_too() -> None:
    policy = Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), inference=Clear(), **SAFE)

    assert holes(policy, vanilla=True, front_learns=False, head_learns=False) == [
        "evaluation and prediction send activations in the clear"
    ]


def test_wrong_claim_6_what_was_released_once_costs_nothing_again(ledger: Ledger) -> None:
    policy = Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), **SAFE)
    guard = Guard(policy, ledger)
    guard.begin(situation())
    table = guard.table(Records(torch.randn(20, 3), torch.arange(20) % 10))
    before = len(ledger.entries())
    for _ in range(3):
        guard.rows(torch.arange(5))
    again = Guard(policy, ledger)
    again.begin(situation(), guard.position)
    again.adopt(table)
    again.rows(torch.arange(5))

    assert len(ledger.entries()) == before == 2


def test_wrong_claim_6_a_process_that_draws_anew_pays_anew(ledger: Ledger) -> None:
    for _ in range(2):  # the same epoch, in two processes
        guard = Guard(ANEW, ledger)
        guard.begin(situation(vanilla=False))
        guard.begin_pass(5)

    assert len(ledger.entries()) == 4


def test_wrong_claim_7_a_patient_is_no_record(ledger: Ledger) -> None:
    policy = Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), unit="patient", **SAFE)
    guard = Guard(policy, ledger)
    guard.begin(situation())
    with pytest.raises(ConfigError, match="say whose each record is"):
        guard.table(Records(torch.randn(20, 3), torch.arange(20) % 10))
    assert ledger.entries() == []  # what is refused is not paid for
    guard.table(Records(torch.randn(20, 3), torch.arange(20) % 10, torch.arange(20) // 2))
    by_record = Guard(Policy(activations=ROWS, labels=RandomizedLabels(epsilon=0.1), **SAFE), ledger)
    by_record.begin(situation())
    with pytest.raises(LedgerError, match="accounted per patient"):
        by_record.table(Records(torch.randn(20, 3), torch.arange(20) % 10))


@pytest.mark.parametrize(("most", "error"), [(0, ConfigError), (3, ReleaseRefusedError)])
def test_wrong_claim_7_a_unit_with_more_records_than_are_accounted_for_is_refused(
    most: int, error: type[Exception], ledger: Ledger
) -> None:
    policy = dataclasses.replace(ANEW, unit="patient", records_per_unit=2)
    with pytest.raises(error, match="patient"):
        Guard(policy, ledger).begin(situation(vanilla=False, most_of_a_unit=most))

    Guard(policy, ledger).begin(situation(vanilla=False, most_of_a_unit=2))


def test_wrong_claim_8_a_run_in_the_clear_is_told_as_such(ledger: Ledger) -> None:
    Guard(CLEAR, ledger).begin(situation(front_learns=True))
    claim = claim_of(ledger.entries("data"), delta=1e-5, relation=Relation.REPLACE_ONE)

    assert math.isinf(claim.spent.epsilon)
    assert claim.sentence.startswith("No differential privacy may be claimed: activations leave in the clear")
    assert "labels leave in the clear" in claim.sentence


def test_wrong_claim_9_dp_sgd_on_the_front_alone_is_no_dp(ledger: Ledger) -> None:
    policy = Policy(activations=Clear(), labels=RandomizedLabels(epsilon=1.0), front=DpSgd(clip=1.0, noise=8.0), **SAFE)
    with pytest.raises(ReleaseRefusedError, match="activations leave in the clear"):
        Guard(policy, ledger).begin(situation(front_learns=True))


def test_wrong_claim_10_noise_does_not_come_from_the_training_seed() -> None:
    policy = Policy(activations=ROWS, labels=RandomizedLabels(epsilon=1.0), **SAFE)
    records = Records(torch.ones(50, 3), torch.arange(50) % 10)
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        plan = plan_table(policy, Budget(8.0, 1e-5, policy.relation))
        made.append(make_table(policy, plan, records).rows)

    assert not torch.equal(*made)


def test_wrong_claim_11_a_second_run_on_the_same_data_is_not_free(ledger: Ledger) -> None:
    for _ in range(2):
        guard = Guard(Policy(activations=ROWS, labels=RandomizedLabels(epsilon=0.5), **SAFE), ledger)
        guard.begin(situation())
        guard.table(Records(torch.randn(20, 3), torch.arange(20) % 10))
    claim = claim_of(ledger.entries("data"), delta=1e-5, relation=Relation.REPLACE_ONE)

    assert claim.releases == 4
    assert claim.spent.epsilon > 1.5
    assert any("tuned on it" in assumption for assumption in claim.assumptions)


def test_the_claim_names_its_unit_its_numbers_and_what_it_assumes(ledger: Ledger) -> None:
    policy = Policy(activations=Moments(rows=100), epsilon=1.0, classes=10, unit="patient")
    guard = Guard(policy, ledger)
    guard.begin(situation())
    rows = torch.nn.functional.normalize(torch.randn(60, 4))
    guard.table(Records(rows, torch.arange(60) % 10, torch.arange(60) // 6))
    claim = guard.claim

    assert claim is not None
    assert claim.spent.epsilon == pytest.approx(1.0, rel=1e-3)
    assert "one patient were replaced" in claim.sentence
    assert "ε = 1, δ = 1e-05, per patient" in claim.sentence
    assert any("patient ids" in assumption for assumption in claim.assumptions)
