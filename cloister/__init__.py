"""Cloister: train on rented GPUs that never see the data.

Everything a user needs has its name here; the names are looked up when they are first used, so that importing this
package costs nothing and an auditor's machine needs no torch.
"""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from client_side.callbacks import Callback, Control, EpochEnd, Evaluation, StepEnd, TrainState
    from client_side.cutting import Cut, cut
    from client_side.durability import Checkpoints
    from client_side.fronts import (
        UnitRows,
        front_digest,
        frozen,
        load_public_front,
        private_projection,
        projection,
        scattering_1d,
        scattering_2d,
    )
    from client_side.link import NodeAddress, Traffic
    from client_side.remote import RemoteMiddle
    from client_side.sampling import PoissonLoader, SeededSampler
    from client_side.spawn import LocalNode
    from client_side.trainer import Trainer
    from client_side.unsplit import UnsplitTrainer
    from privacy.accounting import PrivacySpent, Relation
    from privacy.claims import Claim
    from privacy.guard import Guard
    from privacy.ledger import Ledger
    from privacy.policy import (
        CLEAR,
        Aggregate,
        Ckks,
        CkksInference,
        CkksSquare,
        Clear,
        DpSgd,
        Frozen,
        GaussianRows,
        Included,
        Moments,
        Never,
        Policy,
        RandomizedLabels,
        Rows,
    )
    from wire.errors import (
        BudgetSpentError,
        CheckpointError,
        CloisterError,
        ConfigError,
        CutError,
        EncryptionError,
        HijackSuspectedError,
        IdentityError,
        LedgerError,
        ReleaseRefusedError,
        TamperingSuspectedError,
        UnreachableError,
        WireError,
    )
    from wire.identity import Identity, create_identity, load_identity
    from wire.recipe import SGD, Adam, AdamW, Loss, Schedule

__all__ = [
    "CLEAR",
    "SGD",
    "Adam",
    "AdamW",
    "Aggregate",
    "BudgetSpentError",
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "Ckks",
    "CkksInference",
    "CkksSquare",
    "Claim",
    "Clear",
    "CloisterError",
    "ConfigError",
    "Control",
    "Cut",
    "CutError",
    "DpSgd",
    "EncryptionError",
    "EpochEnd",
    "Evaluation",
    "Frozen",
    "GaussianRows",
    "Guard",
    "HijackSuspectedError",
    "Identity",
    "IdentityError",
    "Included",
    "Ledger",
    "LedgerError",
    "LocalNode",
    "Loss",
    "Moments",
    "Never",
    "NodeAddress",
    "PoissonLoader",
    "Policy",
    "PrivacySpent",
    "RandomizedLabels",
    "Relation",
    "ReleaseRefusedError",
    "RemoteMiddle",
    "Rows",
    "Schedule",
    "SeededSampler",
    "StepEnd",
    "TamperingSuspectedError",
    "Traffic",
    "TrainState",
    "Trainer",
    "UnitRows",
    "UnreachableError",
    "UnsplitTrainer",
    "WireError",
    "__version__",
    "create_identity",
    "cut",
    "front_digest",
    "frozen",
    "load_identity",
    "load_public_front",
    "private_projection",
    "projection",
    "scattering_1d",
    "scattering_2d",
]

_HOMES: Final = {
    "client_side.callbacks": ("Callback", "Control", "EpochEnd", "Evaluation", "StepEnd", "TrainState"),
    "client_side.cutting": ("Cut", "cut"),
    "client_side.durability": ("Checkpoints",),
    "client_side.fronts": (
        "UnitRows",
        "front_digest",
        "frozen",
        "load_public_front",
        "private_projection",
        "projection",
        "scattering_1d",
        "scattering_2d",
    ),
    "client_side.link": ("NodeAddress", "Traffic"),
    "client_side.remote": ("RemoteMiddle",),
    "client_side.sampling": ("PoissonLoader", "SeededSampler"),
    "client_side.spawn": ("LocalNode",),
    "client_side.trainer": ("Trainer",),
    "client_side.unsplit": ("UnsplitTrainer",),
    "privacy.accounting": ("PrivacySpent", "Relation"),
    "privacy.claims": ("Claim",),
    "privacy.guard": ("Guard",),
    "privacy.ledger": ("Ledger",),
    "privacy.policy": (
        "CLEAR",
        "Aggregate",
        "Ckks",
        "CkksInference",
        "CkksSquare",
        "Clear",
        "DpSgd",
        "Frozen",
        "GaussianRows",
        "Included",
        "Moments",
        "Never",
        "Policy",
        "RandomizedLabels",
        "Rows",
    ),
    "wire.errors": (
        "BudgetSpentError",
        "CheckpointError",
        "CloisterError",
        "ConfigError",
        "CutError",
        "EncryptionError",
        "HijackSuspectedError",
        "IdentityError",
        "LedgerError",
        "ReleaseRefusedError",
        "TamperingSuspectedError",
        "UnreachableError",
        "WireError",
    ),
    "wire.identity": ("Identity", "create_identity", "load_identity"),
    "wire.recipe": ("SGD", "Adam", "AdamW", "Loss", "Schedule"),
}
_HOME_OF: Final = {name: home for home, names in _HOMES.items() for name in names}

try:
    __version__ = metadata.version("cloister")
except metadata.PackageNotFoundError:  # run from a checkout that was not installed
    __version__ = "0.0.0"


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name is
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module 'cloister' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
