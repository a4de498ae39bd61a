"""The sentence that may be claimed for a data set, with its assumptions; and the one that says that none may be.

A claim is about everything the node saw in all runs on the data set. What it leaves out is said beside it: differential
privacy bounds what a record adds, not what the population tells.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Final

from privacy.accounting import Event, PrivacySpent, Relation, SampledGaussian, Unbounded, epsilon_of
from privacy.ledger import Entry

__all__ = ["Claim", "claim_of", "told"]


_LARGE: Final = 700.0  # of ε: beyond it, e^ε is no float
_ROUNDING: Final = 1 - Decimal("1e-6")


@dataclass(frozen=True, slots=True)
class Claim:
    """What may be said.

    Attributes:
        spent: under the relation that was asked for.
        other: ε under the other relation, which is printed beside it.
        sentence: for people who are not of the trade.
        assumptions: what it rests on; each must hold.
        mechanisms: what it sums up: each kind of release, its treatment and its event's numbers, and how often.
        releases: how many entries of the ledger it sums up.
    """

    spent: PrivacySpent
    other: float
    sentence: str
    assumptions: tuple[str, ...]
    mechanisms: tuple[str, ...]
    releases: int

    def lines(self) -> tuple[str, ...]:
        """The sentence, and under it what it rests on."""
        rests = ("It rests on this:", *(f"- {assumption}" for assumption in self.assumptions))
        return (self.sentence, *(rests if self.assumptions else ()))


def claim_of(entries: Sequence[Entry], *, delta: float, relation: Relation, unit: str = "record") -> Claim:
    """The claim that a data set's whole ledger supports.

    Args:
        entries: all of one data set.
        delta: below 1/n.
        relation: which data sets count as neighbours.
        unit: where nothing was released yet.
    """
    events = [entry.event for entry in entries]
    unit = entries[0].unit if entries else unit
    spent = PrivacySpent(epsilon_of(events, delta, relation), delta, relation, unit)
    second = Relation.ADD_REMOVE if relation is Relation.REPLACE_ONE else Relation.REPLACE_ONE
    other = epsilon_of(events, delta, second)
    if not entries:
        return Claim(spent, other, "Nothing was released on this data set.", (), (), 0)
    mechanisms = _mechanisms(entries)
    if math.isinf(spent.epsilon):
        reasons = dict.fromkeys(event.reason for event in events if isinstance(event, Unbounded))
        sentence = f"No differential privacy may be claimed: {'; '.join(reasons)}."
        return Claim(spent, other, sentence, (), mechanisms, len(entries))
    return Claim(spent, other, _sentence(spent), _assumptions(entries), mechanisms, len(entries))


def told(event: Event) -> str:
    """An event's numbers, for people."""
    found = ((field.name.replace("_", " "), getattr(event, field.name)) for field in dataclasses.fields(event))
    return ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in found)


def _mechanisms(entries: Sequence[Entry]) -> tuple[str, ...]:
    counted = Counter(f"{entry.kind} by {entry.treatment}: {told(entry.event)}" for entry in entries)
    return tuple(line if times == 1 else f"{line} ({times} times)" for line, times in counted.items())


def _sentence(spent: PrivacySpent) -> str:
    changed = (
        f"one {spent.unit} were replaced by any other"
        if spent.relation is Relation.REPLACE_ONE
        else f"one {spent.unit} were added, removed, or blanked out"
    )
    return (
        "Whatever the nodes do with everything they received in all runs on this data set, no outcome becomes more "
        f"than {_factor(spent.epsilon)} times as likely if {changed}, but for a probability of {_up(spent.delta)} "
        f"((ε, δ)-differential privacy with ε = {_up(spent.epsilon)}, δ = {_up(spent.delta)}, per {spent.unit})."
    )


def _factor(epsilon: float) -> str:
    """e^ε, never downwards; near 1 with two digits of what it is above 1."""
    if epsilon >= _LARGE:
        return f"e^{_up(epsilon)}"
    more = Decimal(math.expm1(epsilon))
    if more >= Decimal("0.1") or not more:
        return _up(math.exp(epsilon))
    return f"{1 + more.quantize(Decimal(1).scaleb(more.adjusted() - 1), ROUND_CEILING):f}"


def _up(value: float) -> str:
    """To three digits, never downwards; what is beyond the sixth comes from rounding."""
    if value <= 0:
        return "0"
    digit = Decimal(1).scaleb(Decimal(value).adjusted() - 2)
    return f"{float((Decimal(value) * _ROUNDING).quantize(digit, ROUND_CEILING)):.3g}"


def _assumptions(entries: Sequence[Entry]) -> tuple[str, ...]:
    treatments = {entry.treatment for entry in entries}
    found = [
        "the front, and the middle before training, were made without this data",
        "how many records there are, the number of classes, the model and the settings are no secret",
        "each record is one row of this data set, and of no other (nor of this one by another name) that was released",
        "nothing of it left by runs in the clear on data without a name, by predictions, or by loops of one's own",
        "nothing was chosen by looking at this data outside the ledger (settings tuned on it, published accuracies)",
        "noise comes from the operating system's generator, in float64 rounded to a grid (Mironov 2012), no full proof",
        "the owner's machine, its ledger and this implementation are as they should be",
    ]
    if any(isinstance(entry.event, SampledGaussian) for entry in entries):
        found.append("which records joined which sample stays secret")
    if "ckks" in treatments:
        found += [
            "nobody breaks the encryption (ring learning with errors, at 128 bits by the HE standard's table)",
            "how long a step took, and that the node's answers ended a run, tell nothing of the records",
        ]
    if treatments & {"rows", "gaussian", "dp_sgd"}:
        found.append("that a record takes part, and in which batch, is no secret")
    if entries[0].unit != "record":
        found.append(f"the {entries[0].unit} ids say rightly which records belong together")
        if treatments & {"rows", "gaussian", "dp_sgd"}:
            found.append(f"how many records each {entries[0].unit} has is no secret")
    return tuple(found)
