"""The card that goes with a trained model: what it is, what was spent on its data, and what that rests on.

Markdown with the metadata that model hubs read (Mitchell et al. 2019, "Model Cards for Model Reporting"). It holds what
the run measured and the ledger says; what a model is for, and for whom, only its owner knows, so those parts are named
and left to fill in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from cloister.jobs import Job
from privacy.ckks.settings import EncryptionSettings
from privacy.claims import Claim
from privacy.policy import labels_told

__all__ = ["model_card"]


def model_card(
    job: Job,
    result: Mapping[str, object],
    claim: Claim | None,
    encryption: EncryptionSettings | None = None,
    *,
    records: int | None = None,
    units: int | None = None,
) -> str:
    """The card of one run.

    Args:
        job: as it ran.
        result: the run's, as ``result.json`` has it.
        claim: what the ledger supports; ``None`` where nothing is accounted.
        encryption: of the middle, where there was any.
        records: that were trained on; ``None`` where the loader does not tell.
        units: whose these are; ``None`` where nobody said.
    """
    parts = [_head(), _about(job, result), _data(job, result, records, units), _privacy(claim)]
    parts += [] if encryption is None else [_encryption(encryption)]
    parts += [_quality(result, claim), _open()]
    return "\n".join(line for part in parts for line in part)


def _head() -> Iterator[str]:
    yield from ("---", "library_name: pytorch", "tags: [split-learning, cloister]", "---", "", "# Model card", "")


def _about(job: Job, result: Mapping[str, object]) -> Iterator[str]:
    vanilla = f"vanilla: the loss is computed on the node; {labels_told(job.privacy.policy())}"
    topology = vanilla if job.cut.head is None else f"U-shaped, head from {job.cut.head}; labels stay with the owner"
    yield from ("## Model", "")
    yield from _table(
        {
            "model": f"`{job.model.factory}`",
            "file": f"`{result['model']}`".replace(str(job.output.dir) + "/", ""),
            "SHA-256": f"`{result['model_sha256']}`",
            "cut": f"front up to `{job.cut.front}`; {topology}",
            "program of the middle, SHA-256": f"`{result['program_sha256']}`",
            "optimizer": f"`{job.optimizer.recipe()}`",
            "trained": f"{result['epochs']} epochs, {result['steps']} steps" + (", stopped early" * _stopped(result)),
        }
    )


def _stopped(result: Mapping[str, object]) -> bool:
    return result["interrupted"] is True


def _data(job: Job, result: Mapping[str, object], records: int | None, units: int | None) -> Iterator[str]:
    yield from ("## Training data", "")
    yield from _table(
        {
            "data": f"`{job.data.train}`",
            "records": "not told by the loader" if records is None else f"{records:,}",
            "name in the privacy ledger": f"`{result['data_set']}`" if result["data_set"] else "none",
            "privacy ledger": f"`{result['ledger']}`" if result["ledger"] else "none",
            "unit of privacy": job.privacy.unit + ("" if units is None else f", of which there are {units:,}"),
        }
    )


def _privacy(claim: Claim | None) -> Iterator[str]:
    yield from ("## Privacy", "")
    if claim is None:
        yield from ("Nothing is claimed: activations left in the clear, and nothing was accounted.", "")
        return
    yield from (claim.sentence, "")
    if claim.assumptions:
        yield from ("It rests on this:", "", *(f"- {assumption}" for assumption in claim.assumptions), "")
    yield from ("Released on this data set, by all runs together:", "", *(f"- {m}" for m in claim.mechanisms), "")
    if math.isfinite(claim.spent.epsilon):
        spent = claim.spent
        other = f"by the other relation {claim.other:.4g}"
        yield f"ε = {spent.epsilon:.4g} ({spent.relation}; {other}), δ = {spent.delta:g}."
        yield "This counts what the nodes saw, and this model. A later run on the same data adds to it, and so does"
        yield from ("whatever else is published of the data, such as the accuracy on training records.", "")


def _encryption(used: EncryptionSettings) -> Iterator[str]:
    yield from ("## Encryption", "")
    kept = "stayed on the node; output gradients went up encrypted, input gradients came down encrypted"
    gradients = "went up as one sum a step, without noise"
    if used.noise is not None:
        gradients = f"each record's clipped to {used.gradient_clip:g} over all layers; the sum went up, noised"
    yield from _table(
        {
            "scheme": f"CKKS, ring degree {used.ring_degree}, modulus of {used.modulus_bits} bits; a key for each step",
            "security": f"{used.security_bits} bits, by the HomomorphicEncryption.org table",
            "scales": f"2^{used.value_bits} for activations, 2^{used.weight_bits} for weights",
            "activations": f"clipped to norm {used.clip:g}, and encrypted",
            "the layer's gradients": gradients,
            "the layer's weights": "came down in the clear with each step" if used.weights == "sent" else kept,
        }
    )


def _quality(result: Mapping[str, object], claim: Claim | None) -> Iterator[str]:
    yield from ("## Evaluation", "")
    yield from _table(
        {
            "test accuracy": _number(result["test_accuracy"]),
            "test loss": _number(result["test_loss"]),
            "epoch loss of the last epoch, on what was trained on": _number(result["final_loss"]),
        }
    )
    if claim is not None and math.isfinite(claim.spent.epsilon):
        yield from ("The claim is about the training records; it does not cover the test records' figures above.", "")


def _number(value: object) -> str:
    return "not measured" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


def _open() -> Iterator[str]:
    yield from ("## For its owner to fill in", "", "- intended use, and uses to keep away from", "")
    yield from ("- who the training data describes, and whom it leaves out", "- licence and contact", "")


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    yield from ("| | |", "|---|---|")
    for name, value in rows.items():
        yield f"| {name} | {value.replace('|', '&#124;')} |"
    yield ""
