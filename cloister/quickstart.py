"""The README's first example, word for word what ``cloister demo`` runs."""

from __future__ import annotations

import torch

import cloister
from cloister import digits

__all__ = ["train"]


def train(
    node: str, owner: cloister.Identity | str, *callbacks: cloister.Callback
) -> tuple[cloister.Cut, cloister.Evaluation]:
    """Trains a digits network through ``node`` and evaluates it: images, labels, stem and head stay here."""
    torch.manual_seed(0)
    model = digits.model()  # any nn.Module; this one has a stem, a body and a head
    cut = cloister.cut(model, front="stem", head="head", example=torch.zeros(64, 1, 8, 8))

    with cloister.Trainer(
        cut,
        policy=cloister.CLEAR,
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
