"""What all cuts are measured against: the records, the half that the attacker knows, and a judge of reconstructions."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from privacy.leakage.deadline import Deadline, descend
from privacy.leakage.networks import Classifier
from privacy.leakage.results import Exhibit, Score, Settings
from wire.errors import ConfigError

__all__ = ["Bench"]

_FEWEST_ROWS: Final = 40
_FEWEST_PER_CLASS: Final = 4  # fewer, and "classes" are more likely a measured number
_SMALLEST_IMAGE: Final = 6
_WIDE_WINDOW: Final = (1.5, 16)  # SSIM's own Gaussian, 11 pixels wide, from this size on
_NARROW_SIGMA: Final = 0.5  # 5 pixels: what smaller images leave room for
_CLEARLY: Final = 3.0  # standard errors by which an error must be lower, so that chance does not decide
_BATCH: Final = 64
_EPOCHS: Final = 20
_RANKS: Final = (2, 3, 4)


class Bench:
    """Records in two halves, their scale, the mean input, and a classifier.

    Attributes:
        known: inputs that the attacker has, [A, ...] float32.
        attacked: inputs that it wants, [B, ...].
        known_labels: [A] int64, or ``None`` where labels are no classes.
        attacked_labels: [B].
        classes: how many; 0 without.
        measure: what similarity means: ``SSIM`` or ``correlation``.
    """

    def __init__(self, inputs: Tensor, labels: Tensor | None, settings: Settings) -> None:
        """Divides the records at random, and trains the classifier.

        Args:
            inputs: [N, C, H, W] images, [N, C, L] signals or [N, F] vectors, floating.
            labels: [N] classes from 0, of integers; anything else (or ``None``) leaves out all that is about labels.
            settings: how the audit runs.

        Raises:
            ConfigError: inputs that the audit cannot reconstruct, or too few of them.
        """
        _refuse(inputs)
        self.settings = settings
        generator = torch.Generator().manual_seed(settings.seed)
        order = torch.randperm(len(inputs), generator=generator)[: settings.rows]
        half = len(order) // 2
        self.known, self.attacked = inputs[order[:half]].float(), inputs[order[half:]].float()
        self.known_labels = self.attacked_labels = None
        self.classes = 0
        if labels is not None and _are_classes(labels, len(inputs), len(order)):
            self.known_labels, self.attacked_labels = labels[order[:half]].long(), labels[order[half:]].long()
            self.classes = int(labels.max()) + 1
        self.low, self.high = self.known.min().item(), self.known.max().item()
        self.centre, self.spread = self.known.mean().item(), self.known.std().item() or 1.0
        self.mean_input = self.known.mean(0, keepdim=True)
        is_image = inputs.ndim == max(_RANKS) and min(inputs.shape[2:]) >= _SMALLEST_IMAGE
        self.measure = "SSIM" if is_image else "correlation"
        self._classifier = None if self.known_labels is None else self._trained_classifier(self.known_labels)
        self.originals_accuracy = self._accuracy(self.attacked)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.known.shape[1:])

    def scaled(self, x: Tensor) -> Tensor:
        """As networks like it: mean 0 and spread 1 over all known inputs."""
        return (x - self.centre) / self.spread

    def unscaled(self, x: Tensor) -> Tensor:
        """The law: ``unscaled(scaled(x)) == x`` up to rounding, where ``x`` is in the range of the known inputs."""
        return (x * self.spread + self.centre).clamp(self.low, self.high)

    def score(self, guessed: Tensor) -> Score:
        """How near ``guessed`` is to the attacked inputs, or to the first of them where it holds fewer."""
        originals = self.attacked[: len(guessed)]
        similarity = self._ssim(guessed, originals) if self.measure == "SSIM" else _correlation(guessed, originals)
        return Score((guessed - originals).square().mean().item(), similarity, self._accuracy(guessed))

    def beats_mean(self, guessed: Tensor) -> bool:
        """Whether ``guessed`` is nearer than the mean input, by more than chance: three standard errors of the gain."""
        originals = self.attacked[: len(guessed)]
        gains = _errors(self.mean_input, originals) - _errors(guessed, originals)
        return bool(gains.mean() > _CLEARLY * gains.std() / len(gains) ** 0.5)

    def shown(self, title: str, x: Tensor) -> Exhibit:
        """The first rows of ``x`` as an exhibit."""
        return Exhibit(title, x[: self.settings.shown].detach().numpy().astype("float32"))

    def _trained_classifier(self, y: Tensor) -> Classifier:
        x = self.scaled(self.known)
        with torch.random.fork_rng([]):
            torch.manual_seed(self.settings.seed)
            made = Classifier(self.shape, self.classes)
        generator = torch.Generator().manual_seed(self.settings.seed)

        def loss_of(step: int) -> Tensor:
            del step
            rows = torch.randint(len(x), (_BATCH,), generator=generator)
            return nn.functional.cross_entropy(made(x[rows]), y[rows])

        steps = max(200, _EPOCHS * len(x) // _BATCH)
        descend(loss_of, made.parameters(), steps=steps, rate=2e-3, deadline=Deadline(self.settings.seconds))
        return made.eval().requires_grad_(False)

    def _accuracy(self, guessed: Tensor) -> float | None:
        if self._classifier is None or self.attacked_labels is None:
            return None
        found = self._classifier(self.scaled(guessed)).argmax(1)
        share: float = (found == self.attacked_labels[: len(guessed)]).float().mean().item()
        return share

    def _ssim(self, guessed: Tensor, originals: Tensor) -> float:
        # Imported here: it takes longer than torch itself, and signals have no need of it.
        from torchmetrics.functional.image import structural_similarity_index_measure  # noqa: PLC0415

        sigma, size = _WIDE_WINDOW
        made = structural_similarity_index_measure(
            guessed,
            originals,
            sigma=sigma if min(originals.shape[2:]) >= size else _NARROW_SIGMA,
            data_range=max(self.high - self.low, 1e-12),
        )
        return float(made if isinstance(made, Tensor) else made[0])  # a pair where the contrast is asked for as well


def _refuse(inputs: Tensor) -> None:
    if not inputs.is_floating_point():
        raise ConfigError(
            f"the audit reconstructs numbers, and these inputs are {inputs.dtype}: put what looks them up (an "
            "embedding) before the model, and give its outputs"
        )
    if inputs.ndim not in _RANKS or 0 in inputs.shape:
        raise ConfigError(
            f"inputs of shape {tuple(inputs.shape)}: the audit takes images [N, C, H, W], signals [N, C, L] and "
            "vectors [N, F]"
        )
    if len(inputs) < _FEWEST_ROWS:
        raise ConfigError(f"{len(inputs)} records: an audit needs at least {_FEWEST_ROWS}")
    if not torch.isfinite(inputs).all():
        raise ConfigError("an input is NaN or infinite: clean the data first")


def _are_classes(labels: Tensor, rows: int, used: int) -> bool:
    whole = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex() and len(labels) == rows
    return whole and int(labels.min()) >= 0 and 2 <= int(labels.max()) + 1 <= used // _FEWEST_PER_CLASS  # noqa: PLR2004


def _errors(guessed: Tensor, originals: Tensor) -> Tensor:
    return (guessed - originals).square().flatten(1).mean(1)


def _correlation(guessed: Tensor, originals: Tensor) -> float:
    """Pearson's, record by record; 0 for a record that does not vary."""
    a, b = guessed.expand_as(originals).flatten(1), originals.flatten(1)
    return (
        nn.functional.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1).mean().item()
    )
