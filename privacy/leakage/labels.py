"""Guessing labels: from the gradients that the owner sends back in the U-shape, from outputs, from activations.

The U-shape keeps labels at home and sends the loss's gradient at the middle's outputs. That gradient is the head's
weights times (prediction - label): rows of one label point one way, so clustering them finds the labels of a model that
has learnt nothing yet. Attacks by norm and by cosine are those of Li et al. 2022 ("Label leakage and protection in
two-party split learning"), the spectral one that of Sun et al. 2022 ("Label leakage and protection from forward
embedding"), here on gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from torch import Tensor, nn

from privacy.leakage.bench import Bench
from privacy.leakage.results import LabelGuess, Treatment
from privacy.leakage.ridge import fit_ridge, ridge_rows
from privacy.leakage.victim import Victim, as_tensors

__all__ = ["guess_labels", "matched_accuracy"]

_MOST_ROWS: Final = 1000  # clustered at once: a second on one core
_MOST_AXES: Final = 64  # principal axes kept before clustering: gradients of K classes lie on about K
_CHUNK: Final = 64
_DRAWS: Final = 5
_NOTHING: Final = "nothing but the number of classes; clusters are named in the best way"
_ONE_EACH: Final = "one row of each class"
_HALF: Final = "the labels of half of the records"


def guess_labels(
    victim: Victim, bench: Bench, known: Tensor, attacked: Tensor, treatment: Treatment | None
) -> tuple[tuple[LabelGuess, ...], str]:
    """Every guess, and why there are not more; a second or two each, so that no deadline is needed.

    Args:
        victim: the model.
        bench: the records.
        known: what the node sees of ``bench.known``.
        attacked: what it sees of ``bench.attacked``.
        treatment: of the activations, for what the middle makes of them.
    """
    if bench.known_labels is None or bench.attacked_labels is None:
        return (), "labels are no classes, or there are fewer than 4 records for each: no guess was made"
    labels = bench.attacked_labels[:_MOST_ROWS]
    probed = _probe(known, bench.known_labels, attacked[:_MOST_ROWS], labels, bench)
    found = [LabelGuess("activations", "linear probe", _HALF, probed)]
    if victim.middle is None:
        return tuple(found), "only the front was given: outputs and gradients were not tried"
    seed = bench.settings.seed
    behind = partial(_behind, victim, victim.middle, treatment)
    before, _ = behind(bench.known[:_MOST_ROWS], bench.known_labels[:_MOST_ROWS], seed=seed)
    outputs, gradients = behind(bench.attacked[:_MOST_ROWS], labels, seed=seed + 1)
    probed = _probe(before, bench.known_labels[:_MOST_ROWS], outputs, labels, bench)
    found += [
        LabelGuess("outputs", "linear probe", _HALF, probed),
        LabelGuess("outputs", "k-means", _NOTHING, _clustered(outputs, labels, bench)),
    ]
    if victim.head is None:
        return tuple(found), "without a head the labels go to the node: it needs no guess"
    if gradients is None:
        return tuple(found), "the head's output is no [B, classes]: gradients were not tried"
    return (*found, *_from_gradients(gradients, labels, bench)), ""


def _behind(
    victim: Victim, middle: nn.Module, treatment: Treatment | None, /, x: Tensor, labels: Tensor, *, seed: int
) -> tuple[Tensor, Tensor | None]:
    """The middle's outputs [B, D] for ``x``, and the loss's gradients there, as a U-shaped step sends them."""
    generator = torch.Generator().manual_seed(seed)
    outputs, gradients = [], []
    for rows, wanted in zip(torch.split(x, _CHUNK), torch.split(labels, _CHUNK), strict=True):
        with torch.no_grad():
            crossing, kept = victim.run(rows)
            made = as_tensors(middle(*victim.treated(crossing, treatment, generator)))
        outputs.append(torch.cat([t.float().flatten(1) for t in made], 1))
        if victim.head is not None and (gradient := _gradient(victim.head, made, kept, wanted)) is not None:
            gradients.append(gradient)
    return torch.cat(outputs), torch.cat(gradients) if gradients else None


def _gradient(head: nn.Module, made: tuple[Tensor, ...], kept: tuple[Tensor, ...], labels: Tensor) -> Tensor | None:
    leaves = [t.detach().requires_grad_() for t in made if t.is_floating_point()]
    given = iter(leaves)
    with torch.enable_grad():
        (logits, *_) = as_tensors(head(*(next(given) if t.is_floating_point() else t for t in made), *kept))
        if logits.ndim == 2 and logits.shape[1] > int(labels.max()):  # noqa: PLR2004 -- rows and classes
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        elif logits.shape[1:].numel() == 1 and int(labels.max()) <= 1:
            loss = nn.functional.binary_cross_entropy_with_logits(logits.reshape(-1), labels.float(), reduction="sum")
        else:
            return None
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, leaves, allow_unused=True)
    rows = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
    return torch.cat([g.flatten(1).float() for g in rows], 1)


def _from_gradients(gradients: Tensor, labels: Tensor, bench: Bench) -> tuple[LabelGuess, ...]:
    unit = nn.functional.normalize(gradients, dim=1)
    norms = gradients.norm(dim=1, keepdim=True)
    # The largest directions of the centred rows, each row's place along them scaled to the axis's own spread.
    left, _, _ = torch.linalg.svd(gradients - gradients.mean(0), full_matrices=False)
    spectrum = left[:, : max(1, bench.classes - 1)] * len(left) ** 0.5
    return (
        LabelGuess("gradients", "k-means", _NOTHING, _clustered(gradients, labels, bench)),
        LabelGuess("gradients", "k-means of directions", _NOTHING, _clustered(unit, labels, bench)),
        LabelGuess("gradients", "norm", _NOTHING, _clustered(norms.clamp_min(1e-12).log(), labels, bench)),
        LabelGuess("gradients", "spectral", _NOTHING, _clustered(spectrum, labels, bench)),
        LabelGuess("gradients", "cosine", _ONE_EACH, _by_cosine(unit, labels, bench)),
    )


def _clustered(rows: Tensor, labels: Tensor, bench: Bench) -> float:
    """K-means, its clusters named in the best way: what an attacker who can name clusters gets."""
    centred = (rows - rows.mean(0)).double()
    spread = centred.square().mean().sqrt()
    if not spread > 0:  # all alike: one cluster
        return matched_accuracy(np.zeros(len(labels), dtype=np.int64), labels.numpy(), bench.classes)
    if centred.shape[1] > _MOST_AXES:
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        centred = left[:, :_MOST_AXES] * values[:_MOST_AXES]
    points = (centred / spread).numpy()
    clusters = min(bench.classes, len(np.unique(points, axis=0)))  # more than there are points is an error
    found = KMeans(clusters, n_init=10, random_state=bench.settings.seed).fit_predict(points)
    return matched_accuracy(found, labels.numpy(), bench.classes)


def matched_accuracy(clusters: NDArray[np.int64], labels: NDArray[np.int64], classes: int) -> float:
    """The share of labels that the best one-to-one naming of clusters gets right (the Hungarian method)."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (clusters, labels), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    return float(table[rows, columns].sum() / len(labels))


def _by_cosine(unit: Tensor, labels: Tensor, bench: Bench) -> float:
    """Each row gets the label of that one of the known rows which points most nearly the same way; mean of 5 draws."""
    generator = torch.Generator().manual_seed(bench.settings.seed)
    shares = []
    for _ in range(_DRAWS):
        order = torch.randperm(len(labels), generator=generator)
        first = [int(rows[0]) for k in range(bench.classes) if len(rows := order[labels[order] == k])]
        others = torch.ones(len(labels), dtype=torch.bool)
        others[first] = False
        found = labels[first][(unit[others] @ unit[first].T).argmax(1)]
        shares.append((found == labels[others]).float().mean().item())
    return sum(shares) / len(shares)


def _probe(known: Tensor, known_labels: Tensor, rows: Tensor, labels: Tensor, bench: Bench) -> float:
    """Ridge regression onto the classes, trained on known records."""
    count = ridge_rows(known[0].numel(), bench.settings.seconds)
    wanted = nn.functional.one_hot(known_labels[:count], bench.classes).float()
    fitted = fit_ridge(known[:count].flatten(1), wanted)
    return (fitted(rows.flatten(1)).argmax(1) == labels).float().mean().item()
