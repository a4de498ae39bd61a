"""What audits of the leakage of small models need."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import pytest
import torch
from torch import Tensor

from cloister import digits
from privacy.leakage import Bench, CutLeakage, Parts, Settings, audit_cut, decoding

__all__ = ["QUICK", "bench", "few_steps", "parts_of", "scans", "stem"]

# Attacks end after some steps here, not by the clock: a busy machine must not change what they find.
QUICK: Final = Settings(seconds=60, rows=600)


@pytest.fixture(scope="module", autouse=True)
def few_steps() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "_FEWEST_STEPS", 40)
        patch.setattr(decoding, "_EPOCHS", 2)
        patch.setattr("privacy.leakage.bench._EPOCHS", 2)
        yield


@pytest.fixture(scope="module")
def scans() -> tuple[Tensor, Tensor]:
    images, labels = digits.load("train").tensors
    return images, labels


@pytest.fixture(scope="module")
def bench(scans: tuple[Tensor, Tensor]) -> Bench:
    return Bench(*scans, QUICK)


@pytest.fixture(scope="module")
def stem(bench: Bench) -> CutLeakage:
    """The demo's cut, freshly initialised."""
    return audit_cut("stem", parts_of(digits.model), bench)


def parts_of(make: Any) -> Parts:
    torch.manual_seed(0)
    model = make()
    return Parts(model.stem, model.body, model.head)
