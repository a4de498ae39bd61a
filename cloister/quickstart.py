"""The README's first example, word for word what ``cloister demo`` runs."""

from __future__ import annotations

import torch

import cloister
from cloister import digits

__all__ = ["train"]


def train(node: str, identity: cloister.Identity, *callbacks: cloister.Callback) -> cloister.Cut:
    """Trains the digits' network through ``node`` for three epochs; prints what the test split says."""
    # [README]
    torch.manual_seed(0)
    model = digits.model()  # any nn.Module; this one has a stem, a body and a head
    images, _ = next(iter(digits.train_loader()))
    cut = cloister.cut(model, front="stem", head="head", example=images)

    with cloister.Trainer(
        cut,
        node=node,  # "host:port#sha256:…", as `cloister node` prints it
        identity=identity,  # from `cloister keys init --role owner`
        optimizer=cloister.AdamW(lr=2e-3),
        loss="cross_entropy",
        micro_batches=2,
        callbacks=callbacks,
    ) as trainer:
        trainer.fit(digits.train_loader(), epochs=3)
        print(trainer.evaluate(digits.test_loader()))

    model = cut.reassemble()  # the same nn.Module, its middle trained on the node
    # [/README]
    return cut
