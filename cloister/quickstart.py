"""The README's first examples, word for word what ``cloister demo`` runs."""

from __future__ import annotations

import torch

import cloister
from cloister import digits, heartbeats

__all__ = ["train", "train_privately"]


def train(
    node: str, owner: cloister.Identity | str, ledger: cloister.Ledger, *callbacks: cloister.Callback
) -> tuple[cloister.Cut, cloister.Evaluation]:
    """Trains a digits network through ``node`` and evaluates it: images, labels, stem and head stay here."""
    torch.manual_seed(0)
    model = digits.model()  # any nn.Module; this one has a stem, a body and a head
    cut = cloister.cut(model, front="stem", head="head", example=torch.zeros(64, 1, 8, 8))

    with cloister.Trainer(
        cut,
        policy=cloister.CLEAR,
        ledger=ledger,  # where it is written down what left; without, in your own
        node=node,  # "host:port#sha256:…", as `cloister node` prints it
        identity=owner,  # the folder that `cloister keys init --role owner` made
        optimizer=cloister.AdamW(lr=2e-3),
        loss="cross_entropy",
        micro_batches=2,
        callbacks=callbacks,
    ) as trainer:
        trainer.fit(digits.train_loader(), epochs=3)
        result = trainer.evaluate(digits.test_loader())

    return cut, result  # cut.reassemble() is the model itself, its middle trained on the node


def train_privately(
    node: str, owner: cloister.Identity | str, ledger: cloister.Ledger, *callbacks: cloister.Callback
) -> tuple[cloister.Evaluation, cloister.Claim | None]:
    """Trains on the heart beats of 1,536 patients so that no node learns much of any of them: ε = 1 per patient."""
    torch.manual_seed(0)
    model = heartbeats.model(front="pca")  # its stem was fitted on other patients, and does not learn
    cut = cloister.cut(model, front="stem", example=torch.zeros(64, 1, 128))

    with cloister.Trainer(
        cut,
        policy=cloister.Policy(activations=cloister.Moments(rows=20_000), classes=5, epsilon=1.0, unit="patient"),
        units=heartbeats.train_units(count=2048, most=24),  # whose each beat is
        ledger=ledger,  # what left, and what it cost, written down before it leaves
        node=node,
        identity=owner,
        optimizer=cloister.AdamW(lr=2e-3),
        callbacks=callbacks,
    ) as trainer:
        trainer.fit(heartbeats.train_loader(count=2048, most=24), epochs=2)
        result = trainer.evaluate(heartbeats.test_loader(count=2048, most=24))  # at home: no test record leaves either
        return result, trainer.guard.claim
