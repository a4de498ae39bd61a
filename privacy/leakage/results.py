"""What an audit is told, and what it finds: plain data.

Similarity is SSIM for images and Pearson's correlation for signals and vectors: 1 is the original, and what a baseline
reaches (the mean of all inputs, say) is what a number must be compared with.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from wire.errors import ConfigError

__all__ = [
    "Attack",
    "CutLeakage",
    "Exhibit",
    "LabelGuess",
    "Outcome",
    "Score",
    "Settings",
    "Treatment",
]


class Outcome(enum.StrEnum):
    """How an attack ended."""

    #: Its reconstructions are nearer to the originals than the mean input is.
    RECONSTRUCTS = "reconstructs"
    #: It cannot beat the mean input even without noise: the attack failed, which proves nothing.
    VOID = "void"
    #: What it needs is not there, such as a front that trains on gradients from the node.
    NO_CHANNEL = "no channel"


@dataclass(frozen=True, slots=True)
class Treatment:
    """``rows``, as a policy states it: each record's activations, clipped, plus Gaussian noise.

    Attributes:
        clip: L2 norm of one record's activations at most.
        noise: standard deviation, in units of ``clip``; 0 clips only.
    """

    clip: float
    noise: float

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ConfigError: the clip is not above 0, the noise below 0, or one of them is no finite number.
        """
        if not (math.isfinite(self.clip) and math.isfinite(self.noise) and self.clip > 0 and self.noise >= 0):
            raise ConfigError(
                f"rows of clip {self.clip} and noise {self.noise}: clip must be above 0, noise at least 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How an audit runs.

    Attributes:
        seconds: the most that one attack may take, on either of clear and treated activations.
        deep: whether the slower attacks run too.
        seed: fixes every draw; with the same seed the same numbers come out, unless a time limit binds.
        rows: records used at most; half of them the attacker knows, the other half it attacks.
        shown: originals in a picture.
        treatment: what is done to the activations before the node sees them; ``None`` leaves them clear.
    """

    seconds: float = 60.0
    deep: bool = False
    seed: int = 0
    rows: int = 4000
    shown: int = 8
    treatment: Treatment | None = None

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ConfigError: a number that leaves nothing to do.
        """
        if not (math.isfinite(self.seconds) and self.seconds > 0):
            raise ConfigError(f"{self.seconds} seconds for an attack: give more than 0")
        if self.rows < 1 or self.shown < 1:
            raise ConfigError("an audit needs rows, and shows at least one of them")


@dataclass(frozen=True, slots=True)
class Score:
    """How near reconstructions are to the originals.

    Attributes:
        mse: mean squared error, in the inputs' own unit, squared.
        similarity: mean SSIM or correlation; see the module.
        accuracy: of a classifier, trained on originals, on the reconstructions; ``None`` where labels are no classes.
    """

    mse: float
    similarity: float
    accuracy: float | None


@dataclass(frozen=True, slots=True)
class Attack:
    """One attempt to reconstruct inputs.

    Attributes:
        name: which.
        knows: what the attacker has, in words.
        outcome: how it ended on clear activations, whatever the treatment.
        note: why, in words; empty where the outcome says it all.
        seconds: how long it took.
        clear: on the activations as they are.
        treated: on treated ones; ``None`` without a treatment, or where the attack is void.
        treated_beats_mean: whether that is nearer to the originals than the mean input.
        labels: the share of labels that it guessed on the way, where it guesses any.
    """

    name: str
    knows: str
    outcome: Outcome
    note: str = ""
    seconds: float = 0.0
    clear: Score | None = None
    treated: Score | None = None
    treated_beats_mean: bool | None = None
    labels: float | None = None

    @property
    def seen(self) -> Score | None:
        """On what the node would see: treated activations where there is a treatment."""
        return self.treated or self.clear


@dataclass(frozen=True, slots=True)
class LabelGuess:
    """One way to guess labels.

    Attributes:
        source: what it reads: ``gradients`` (at the middle's outputs), ``outputs`` or ``activations``.
        method: which.
        knows: what the attacker has, in words.
        accuracy: share of labels guessed.
    """

    source: str
    method: str
    knows: str
    accuracy: float


@dataclass(frozen=True, slots=True)
class Exhibit:
    """Some inputs, or what became of them.

    Attributes:
        title: which.
        values: float32 [rows, channels, height, width], [rows, channels, length] or [rows, features].
    """

    title: str
    values: NDArray[np.float32] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutLeakage:
    """What one cut reveals.

    Attributes:
        cut: the front's last submodule.
        dimensions: activations per record that cross.
        input_dimensions: numbers in one input.
        measure: what similarity means here: ``SSIM`` or ``correlation``.
        known: records that the attacker knows.
        attacked: records that it attacks; accuracies of labels are of at most 1,000 of them.
        front_trains: whether the front has parameters that train on the node's gradients.
        treatment: what was done to the activations.
        distance_correlation: between inputs and clear activations: the bias-corrected square of Székely and Rizzo
            (2014), 0 on average where they are independent and 1 where one is the other up to rotation and scale.
        treated_distance_correlation: the same for treated activations.
        chance: what guessing the commonest label gets; ``None`` where labels are no classes.
        baselines: what an attacker gets without an attack: the mean input, the mean of the right class, and the known
            input with the nearest activations (treated ones, where there is a treatment).
        originals_accuracy: of the classifier on the originals.
        attacks: those that reconstruct; the first one is the informed decoder.
        labels: those that guess labels.
        labels_note: why there are none, or fewer.
        exhibits: originals first, then baselines and reconstructions of the same records.
    """

    cut: str
    dimensions: int
    input_dimensions: int
    measure: str
    known: int
    attacked: int
    front_trains: bool
    treatment: Treatment | None
    distance_correlation: float
    treated_distance_correlation: float | None
    chance: float | None
    baselines: dict[str, Score]
    originals_accuracy: float | None
    attacks: tuple[Attack, ...]
    labels: tuple[LabelGuess, ...]
    labels_note: str
    exhibits: tuple[Exhibit, ...]

    @property
    def decoder(self) -> Attack:
        """The informed decoder, which decides whether the audit holds."""
        return self.attacks[0]

    @property
    def void(self) -> bool:
        """Whether the audit of this cut failed: its figures then say nothing."""
        return self.decoder.outcome is Outcome.VOID

    def best_guess(self, *sources: str) -> LabelGuess | None:
        """The best of the guesses that read one of ``sources`` (of all, where none is named)."""
        found = [guess for guess in self.labels if not sources or guess.source in sources]
        return max(found, key=lambda guess: guess.accuracy, default=None)
