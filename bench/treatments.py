"""The treatments that ``bench privacy`` compares, each with what the middle behind it is."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import cloister
from privacy.accounting import Relation, gaussian_noise
from privacy.ledger import Budget
from privacy.tables import plan_table

__all__ = ["BATCH", "CLEAR", "FRESH_EPOCHS", "TREATMENTS", "Treatment"]

BATCH: Final = 512
FRESH_EPOCHS: Final = 10
_TABLE_ROWS: Final = 8192  # sampled from moments


@dataclass(frozen=True, slots=True)
class Treatment:
    """One way to let records leave.

    Attributes:
        policy: from the policy's other arguments.
        row_by_row: whether each record's own row leaves, so that a patient's records are bounded in number.
        every_front: whether it is measured on all fronts, not on the first alone.
        deep: whether the middle has a hidden layer; what noised rows teach, one layer holds.
        steps: of training; epochs are as many as that takes.
        fresh: whether records leave anew in each of ten epochs.
        u_shape: whether labels stay, and output gradients leave anew as well.
        learns: whether the front trains.
    """

    name: str
    policy: Callable[[dict[str, Any]], cloister.Policy]
    row_by_row: bool = False
    every_front: bool = False
    deep: bool = False
    steps: int = 100
    fresh: bool = False
    u_shape: bool = False
    learns: bool = False


def _rows(more: dict[str, Any]) -> cloister.Policy:
    # Labels take half of what little there is: a row whose label is wrong teaches nothing.
    labels = cloister.RandomizedLabels(epsilon=more["epsilon"] / 2 / more.get("records_per_unit", 1))
    return cloister.Policy(activations=cloister.Rows(clip=1.0), labels=labels, **more)


def _fresh_rows(more: dict[str, Any]) -> cloister.Policy:
    return _anew(more, learns=False)


def _learning_front(more: dict[str, Any]) -> cloister.Policy:
    return _anew(more, learns=True)


def _anew(more: dict[str, Any], *, learns: bool) -> cloister.Policy:
    """What :func:`_rows` gives to rows that leave once, in equal shares of μ² for all epochs, and for the front."""
    once = _rows(more)
    alone = plan_table(once, Budget(once.epsilon, once.delta, once.relation)).treatment.noise or 0.0
    noise = alone * math.sqrt(FRESH_EPOCHS * (2 if learns else 1))
    # A unit's records leave in rows of their own (square root), but add up in one gradient.
    dp_sgd = cloister.DpSgd(clip=1.0, noise=noise * math.sqrt(once.records_per_unit))
    return dataclasses.replace(
        once,
        activations=cloister.Rows(clip=1.0, noise=noise, once=False),
        front=dp_sgd if learns else cloister.Frozen(),
    )


def _fresh_rows_and_gradients(more: dict[str, Any]) -> cloister.Policy:
    """Labels stay; rows and output gradients have equal shares of μ² in each epoch."""
    noise = gaussian_noise(
        epsilon=more["epsilon"],
        delta=more["delta"],
        sensitivity=1.0 if more["relation"] is Relation.ADD_REMOVE else 2.0,
        count=FRESH_EPOCHS * 2,
    ) * math.sqrt(more.get("records_per_unit", 1))
    return cloister.Policy(
        activations=cloister.Rows(clip=1.0, noise=noise, once=False),
        labels=cloister.Never(),
        # A record's gradient is that of a mean over the batch.
        gradients=cloister.GaussianRows(clip=1.0 / BATCH, noise=noise),
        **more,
    )


def _aggregate(more: dict[str, Any]) -> cloister.Policy:
    return cloister.Policy(activations=cloister.Aggregate(clip=1.0, rate=0.5, releases=20), **more)


def _moments(more: dict[str, Any]) -> cloister.Policy:
    return _of_moments(more, per_class=False)


def _moments_by_class(more: dict[str, Any]) -> cloister.Policy:
    return _of_moments(more, per_class=True)


def _of_moments(more: dict[str, Any], *, per_class: bool) -> cloister.Policy:
    # Two records of one class move 2 apart in any case; with these weights, no other pair moves farther.
    moments = cloister.Moments(count_weight=0.7, second_weight=0.7, per_class=per_class, rows=_TABLE_ROWS)
    return cloister.Policy(activations=moments, **more)


TREATMENTS: Final = (
    Treatment("rows, once", _rows, row_by_row=True),
    Treatment("rows, anew each epoch", _fresh_rows, row_by_row=True, fresh=True),
    Treatment("rows and gradients, anew", _fresh_rows_and_gradients, row_by_row=True, fresh=True, u_shape=True),
    Treatment("rows anew, front with DP-SGD", _learning_front, row_by_row=True, fresh=True, learns=True),
    Treatment("aggregate", _aggregate, deep=True, steps=100),
    Treatment("moments", _moments, every_front=True, deep=True, steps=240),
    Treatment("moments, by class", _moments_by_class, every_front=True, deep=True, steps=240),
)


def _clear(_: dict[str, Any]) -> cloister.Policy:
    return cloister.CLEAR


CLEAR: Final = Treatment("no DP", _clear, every_front=True, deep=True, steps=480)
