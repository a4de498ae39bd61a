"""Which cut and which treatment the figures speak for, and why, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from privacy.leakage.results import Attack, CutLeakage, Outcome

__all__ = ["LIMITS", "Advice", "advise", "explained", "percent", "strongest"]

#: What stands beneath every result.
LIMITS: Final = (
    "An attack that fails proves nothing: another one may succeed.",
    (
        "These figures are measured on these records and these attacks. They are no claim of differential privacy, "
        "and no bound on what a node can learn."
    ),
)

_AS_GOOD: Final = 0.05  # a cut reconstructs as little as another if it explains at most this much more
_HALF_WAY: Final = 0.5  # of the way from chance to certainty
_NEARLY_ALL: Final = 0.8  # of what varies in the inputs

_CLEAR: Final = "No cut by itself protects what crosses it: `clear` is for a node that you trust."
_HIDDEN: Final = (
    "With this noise no attack here comes nearer than the mean input. What may be claimed is the accounted ε of the "
    "run, not this. Noise on each record costs much accuracy: compare `moments`, which noises sums over many records."
)
_STEERED: Final = (
    "This front trains. Whatever noise is added to its activations, each record also moves its weights, and a node "
    "that sends gradients of its own choice can steer it: pre-train it on public data and freeze it, or encrypt."
)
_FIXED: Final = (
    "This front is fixed, so that `moments` or `aggregate` can release noised sums over many records with an "
    "accounted ε, if what it knows does not come from this data."
)


@dataclass(frozen=True, slots=True)
class Advice:
    """What to do.

    Attributes:
        cut: the recommended cut; ``None`` where the audit of every cut is void.
        treatment: what to do to what leaves, as a policy names it; empty where no cut is recommended.
        reasons: why, a sentence each.
        limits: what the figures do not say.
    """

    cut: str | None
    treatment: str
    reasons: tuple[str, ...]
    limits: tuple[str, ...] = LIMITS


def explained(attack: Attack, leakage: CutLeakage) -> float:
    """The share of the inputs' variation that an attack reconstructs: 0 for the mean input, 1 for the originals."""
    seen, mean = attack.seen, leakage.baselines["mean input"]
    return 0.0 if seen is None or mean.mse <= 0 else max(0.0, 1 - seen.mse / mean.mse)


def strongest(leakage: CutLeakage) -> Attack:
    """The attack whose reconstructions are nearest, on what the node would see."""
    works = [attack for attack in leakage.attacks if attack.outcome is Outcome.RECONSTRUCTS]
    return max(works, key=lambda attack: explained(attack, leakage), default=leakage.decoder)


def advise(found: Sequence[CutLeakage]) -> Advice:
    """The cut of those whose strongest attack explains the least; of equal ones the first, for least work here.

    Args:
        found: in the order in which the model runs.
    """
    valid = [leakage for leakage in found if not leakage.void]
    voids = [leakage.cut for leakage in found if leakage.void]
    failed = (f"Audit failed, so nothing is known of: {', '.join(voids)}.",) if voids else ()
    if not valid:
        return Advice(None, "", (*failed, "No cut can be recommended: no attack worked, not even without noise."))
    shares = [explained(strongest(leakage), leakage) for leakage in valid]
    least = min(shares)
    best = next(leakage for leakage, share in zip(valid, shares, strict=True) if share <= least + _AS_GOOD)
    treatment, why = _treatment(best)
    by_cut = {leakage.cut: share for leakage, share in zip(valid, shares, strict=True)}
    return Advice(best.cut, treatment, (*_choice(best, by_cut), *_reading(best), *why, *_labels(best), *failed))


def _choice(best: CutLeakage, shares: Mapping[str, float]) -> tuple[str, ...]:
    """Why this cut, by what the strongest attack explains behind each."""
    share, least = shares[best.cut], min(shares.values())
    against = "It is the only cut whose audit holds. " if len(shares) == 1 else ""
    reads = (
        f"{against}Behind {best.cut}, the strongest attack ({strongest(best).name}) reconstructs {percent(share)} of "
        f"what varies in the inputs, from {best.dimensions:,} activations a record."
    )
    if len(shares) == 1:
        return (reads,)
    if share == least:
        why = f"Of {len(shares)} cuts, none gives the attacks less."
    else:
        why = (
            f"Of {len(shares)} cuts, the least is {percent(least)}, behind {min(shares, key=shares.__getitem__)}: no "
            f"more than {100 * _AS_GOOD:.0f} points below, and {best.cut} comes first and leaves less work here."
        )
    told = ("Every cut gives nearly everything away: choosing among them protects nothing.",)
    return (reads, why, *(told if least > _NEARLY_ALL else ()))


def _reading(best: CutLeakage) -> tuple[str, ...]:
    """Whether the reconstructions tell what the originals tell."""
    seen = strongest(best).seen
    if seen is None or seen.accuracy is None or best.originals_accuracy is None or best.chance is None:
        return ()
    return (
        (
            f"A classifier reads {percent(seen.accuracy)} of the classes from these reconstructions, "
            f"{percent(best.originals_accuracy)} from the originals; guessing the commonest class gets "
            f"{percent(best.chance)}."
        ),
    )


def _treatment(best: CutLeakage) -> tuple[str, tuple[str, ...]]:
    rows = best.treatment
    steered = (_STEERED,) if best.front_trains else ()
    if rows is not None and not any(attack.treated_beats_mean for attack in best.attacks):
        named = f"rows, clip {rows.clip:g}, noise {rows.noise:g} (in units of the clip)"
        return ("freeze the front; then " if best.front_trains else "") + named, (_HIDDEN, *steered)
    noised = () if rows is None else ("With the noise that was given, an attack still reconstructs: it is too little.",)
    if best.front_trains:
        return "freeze the front and use moments; or ckks, where the middle is one linear layer", (
            *noised,
            _CLEAR,
            *steered,
        )
    return "moments or aggregate", (*noised, _CLEAR, _FIXED)


def _labels(best: CutLeakage) -> tuple[str, ...]:
    guess = best.best_guess("gradients")
    if guess is None or best.chance is None:
        return (best.labels_note[:1].upper() + best.labels_note[1:] + ".",) if best.labels_note else ()
    told = (
        f"From the gradients that a U-shaped step sends, {percent(guess.accuracy)} of the labels were guessed "
        f"({guess.method}, knowing {guess.knows})"
    )
    if guess.accuracy < best.chance + _HALF_WAY * (1 - best.chance):
        return (f"{told}.",)
    return (
        (
            f"{told}: the U-shape alone does not hide labels. Treat the gradients too (`gaussian`), or keep loss and "
            "head behind `moments`, `aggregate` or `ckks`."
        ),
    )


def percent(share: float) -> str:
    """A share in words: 96.5 %."""
    return f"{100 * share:.1f} %"
