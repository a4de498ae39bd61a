"""Which cut and which treatment the figures speak for, and why, in words."""

from __future__ import annotations

from collections.abc import Sequence
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
    return Advice(best.cut, treatment, (_choice(best, len(valid)), *_reading(best), *why, *_labels(best), *failed))


def _choice(best: CutLeakage, count: int) -> str:
    attack = strongest(best)
    share = explained(attack, best)
    against = (
        "It is the only cut whose audit holds" if count == 1 else f"Of {count} cuts it gives the attacks the least"
    )
    return (
        f"{against}: behind {best.cut}, the strongest attack ({attack.name}) reconstructs {percent(share)} of what "
        f"varies in the inputs, from {best.dimensions:,} activations a record."
    )


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
    if rows is not None and not any(attack.treated_beats_mean for attack in best.attacks):
        return f"rows, clip {rows.clip:g}, sigma {rows.sigma:g}", (
            (
                "With this noise no attack here comes nearer than the mean input. What may be claimed is the "
                "accounted ε of the run, not this. Noise on each record costs much accuracy: compare `moments`, "
                "which noises sums over many records."
            ),
        )
    noised = () if rows is None else ("With the noise that was given, an attack still reconstructs: it is too little.",)
    reason = "No cut by itself protects what crosses it: `clear` is for a node that you trust."
    if best.front_trains:
        return "freeze the front and use moments; or ckks with dp_sgd", (
            *noised,
            reason,
            (
                "This front trains. Whatever noise is added to its activations, each record also moves its weights, "
                "and a node that sends gradients of its own choice can steer it: pre-train it on public data and "
                "freeze it, or encrypt."
            ),
        )
    return "moments or aggregate", (
        *noised,
        reason,
        (
            "This front is fixed, so that `moments` or `aggregate` can release noised sums over many records with an "
            "accounted ε."
        ),
    )


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
