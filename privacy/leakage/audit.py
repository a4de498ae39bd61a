"""The audit of one cut: every attack on what the node would see there.

The void rule: an informed decoder that cannot beat the mean input on clear activations has failed, and the cut's audit
with it. A treatment's noise does not count there: it is judged by what is left on treated activations of an attack that
works on clear ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor, nn

from privacy.leakage.bench import Bench
from privacy.leakage.correlation import distance_correlation
from privacy.leakage.deadline import Deadline
from privacy.leakage.decoding import decoder_of, nearest
from privacy.leakage.hijack import hijack
from privacy.leakage.inversion import invert
from privacy.leakage.labels import guess_labels
from privacy.leakage.pseudo import imitate
from privacy.leakage.results import Attack, CutLeakage, Exhibit, Outcome, Score, Settings, Treatment
from privacy.leakage.tried import Tried
from privacy.leakage.victim import Parts, Victim
from wire.errors import ConfigError

__all__ = ["MEAN", "attack_names", "audit", "audit_cut"]

MEAN: Final = "mean input"
_CLASS_MEAN: Final = "class mean"
_NEAREST: Final = "nearest neighbour"
_DECODER: Final = "informed decoder"
_CORRELATION: Final = "distance correlation"
_LABELS: Final = "label inference"
_MOST_NUMBERS: Final = 2**28  # activations kept at once: 1 GiB

_Run = Callable[[Treatment | None, Deadline], Tried]


def attack_names(settings: Settings) -> tuple[str, ...]:
    """What :func:`audit_cut` tells that it starts, in this order."""
    return (_CORRELATION, _DECODER, _LABELS, *(name for name, _, _ in _DEEP if settings.deep))


def audit(
    front: nn.Module,
    rest: tuple[nn.Module, nn.Module | None] | nn.Module | None,
    inputs: Tensor,
    labels: Tensor | None,
    settings: Settings | None = None,
) -> CutLeakage:
    """What the activations behind ``front`` reveal, for a single cut; see :func:`audit_cut`.

    Args:
        front: takes a batch of inputs. Neither it nor the rest is changed.
        rest: (middle, head), or the middle alone (vanilla), or ``None``.
        inputs: [N, C, H, W], [N, C, L] or [N, F], floating.
        labels: [N] classes; anything else leaves out all that is about labels.
        settings: how; see :class:`Settings`.

    Raises:
        ConfigError: data or parts that cannot be audited.
    """
    middle, head = rest if isinstance(rest, tuple) else (rest, None)
    return audit_cut("front", Parts(front, middle, head), Bench(inputs, labels, settings or Settings()))


def audit_cut(name: str, parts: Parts, bench: Bench, tell: Callable[[str], None] | None = None) -> CutLeakage:
    """What the activations at one cut reveal.

    Args:
        name: of the cut, for the report.
        parts: the model; is not changed.
        bench: the records and the judge, shared by all cuts.
        tell: is called with the name of each attack that starts; see :func:`attack_names`.

    Raises:
        ConfigError: the front cannot be audited on these records.
    """
    with torch.random.fork_rng([]):  # a model that draws in its forward must not move the caller's stream
        torch.manual_seed(bench.settings.seed)
        return _Audit(name, parts, bench, tell or (lambda _: None)).run()


class _Audit:
    """One cut at work."""

    def __init__(self, name: str, parts: Parts, bench: Bench, tell: Callable[[str], None]) -> None:
        self._name, self._bench, self._tell = name, bench, tell
        self._treatment = bench.settings.treatment
        self._victim = Victim(parts, bench.known)
        rows = len(bench.known) + len(bench.attacked)
        if rows * self._victim.dimensions > _MOST_NUMBERS:
            fitting = _MOST_NUMBERS // self._victim.dimensions
            raise ConfigError(
                f"{rows} records of {self._victim.dimensions} activations do not fit into memory: at most {fitting} do"
            )
        self._exhibits: list[Exhibit] = [bench.shown("originals", bench.attacked)]
        self._clear = self._seen(None)
        self._treated = self._seen(self._treatment) if self._treatment else self._clear

    def run(self) -> CutLeakage:
        bench, victim = self._bench, self._victim
        self._tell(_CORRELATION)
        inputs = bench.attacked.flatten(1)
        clear, treated = (distance_correlation(inputs, seen[1]) for seen in (self._clear, self._treated))
        baselines = self._baselines()
        self._tell(_DECODER)
        knows = f"{len(bench.known):,} pairs of input and activations"
        attacks = [self._attacked(_DECODER, knows, self._decoder)]
        self._tell(_LABELS)
        labels, note = guess_labels(victim, bench, *self._treated, self._treatment)
        for name, knows, attack in _DEEP if bench.settings.deep else ():
            self._tell(name)
            attacks.append(self._attacked(name, knows, lambda t, d, attack=attack: attack(victim, bench, t, d)))  # type: ignore[misc]  # the default binds this turn's attack
        return CutLeakage(
            cut=self._name,
            dimensions=victim.dimensions,
            input_dimensions=bench.known[0].numel(),
            measure=bench.measure,
            known=len(bench.known),
            attacked=len(bench.attacked),
            front_trains=victim.front_trains,
            treatment=self._treatment,
            distance_correlation=clear,
            treated_distance_correlation=treated if self._treatment else None,
            chance=_commonest(bench.attacked_labels),
            baselines=baselines,
            originals_accuracy=bench.originals_accuracy,
            attacks=tuple(attacks),
            labels=labels,
            labels_note=note,
            exhibits=tuple(self._exhibits),
        )

    def _seen(self, treatment: Treatment | None) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self._bench.settings.seed)
        known = self._victim.seen(self._bench.known, treatment, generator)
        attacked = self._victim.seen(self._bench.attacked, treatment, generator)
        if not (torch.isfinite(known).all() and torch.isfinite(attacked).all()):
            raise ConfigError(f"the activations at {self._name} are NaN or infinite: check the model and its inputs")
        return known, attacked

    def _baselines(self) -> dict[str, Score]:
        bench = self._bench
        guesses = {MEAN: bench.mean_input.expand_as(bench.attacked)}
        if bench.known_labels is not None and bench.attacked_labels is not None:
            means = [
                bench.known[rows].mean(0, keepdim=True) if (rows := bench.known_labels == k).any() else bench.mean_input
                for k in range(bench.classes)
            ]
            guesses[_CLASS_MEAN] = torch.cat(means)[bench.attacked_labels]
        guesses[_NEAREST] = bench.known[nearest(*self._treated)]
        self._exhibits += [bench.shown(name, guess) for name, guess in guesses.items()]
        return {name: bench.score(guess) for name, guess in guesses.items()}

    def _decoder(self, treatment: Treatment | None, deadline: Deadline) -> Tried:
        known, attacked = self._treated if treatment else self._clear
        guess, which = decoder_of(known, self._bench, deadline)
        return Tried(guess(attacked), note=f"the better decoder was a {which}")

    def _attacked(self, name: str, knows: str, run: _Run) -> Attack:
        """One attack on clear activations and, where it works there, on treated ones."""
        bench, whole = self._bench, Deadline(self._bench.settings.seconds)
        tried = run(None, Deadline(bench.settings.seconds))
        if tried.guessed is None:
            return Attack(name, knows, Outcome.NO_CHANNEL, tried.note, whole.spent)
        works = bench.beats_mean(tried.guessed)
        found = Attack(
            name,
            knows,
            Outcome.RECONSTRUCTS if works else Outcome.VOID,
            tried.note,
            whole.spent,
            bench.score(tried.guessed),
            labels=tried.labels,
        )
        self._exhibits.append(bench.shown(name if self._treatment is None else f"{name}, clear", tried.guessed))
        if not works or self._treatment is None:
            return found
        again = run(self._treatment, Deadline(bench.settings.seconds))
        if again.guessed is None:
            return found
        self._exhibits.append(bench.shown(f"{name}, treated", again.guessed))
        return dataclasses.replace(
            found,
            seconds=whole.spent,
            treated=bench.score(again.guessed),
            treated_beats_mean=bench.beats_mean(again.guessed),
            labels=again.labels,
        )


def _commonest(labels: Tensor | None) -> float | None:
    return None if labels is None else labels.bincount().max().item() / len(labels)


_DEEP: Final = (
    ("UnSplit", "the front's architecture, and nothing else", invert),
    ("pseudo-client", "labelled records of the same kind, the architecture, and the middle", imitate),
    ("FSHA", "records of the same kind, the architecture, and the gradients that it sends to the front", hijack),
)
