"""Records of runs that never were, in logs, and bundles of them."""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from eth_account import Account
from eth_account.signers.local import LocalAccount
from safetensors.numpy import save_file

from provenance.bundle import Bundle
from provenance.bundling import collect
from provenance.log import Log
from provenance.models import digest_model
from provenance.receipts import Segment, describe, open_receipt, sign_receipt
from provenance.records import (
    DATASET_DIGEST,
    MODEL_DIGEST,
    BuildDefinition,
    Builder,
    DatasetRecord,
    JobParameters,
    ModelRecord,
    NodeRecord,
    Predicate,
    PrivacyCost,
    Resource,
    RevocationRecord,
    RunDetails,
    RunMetadata,
    RunRecord,
    Subject,
    Training,
    sign_record,
)

CLASS = "c1" * 32
NODE: LocalAccount = Account.from_key("0x" + "77" * 32)


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class Owner:
    """Somebody with a key and a log."""

    folder: Path
    number: int
    receipts: dict[str, tuple[bytes, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key: LocalAccount = Account.from_key("0x" + f"{self.number:02x}" * 32)
        self.log = Log(f"sqlite:///{self.folder / f'{self.number}.sqlite'}")

    def put(
        self, digest: dict[str, str], predicate: Predicate, name: str = "it", key: LocalAccount | None = None
    ) -> bytes:
        envelope = sign_record(Subject(name=name, digest=digest), predicate, key or self.key)
        self.log.append([envelope])
        return envelope

    def dataset(self, name: str) -> bytes:
        return self.put({DATASET_DIGEST: digest_of(name)}, DatasetRecord(kind="files", records=17, order="name"), name)

    def run(
        self,
        model: str,
        datasets: list[str],
        *,
        name: str = "run-1",
        initial: str | None = None,
        segments: int = 3,
        **training: Any,
    ) -> bytes:
        receipts = segments_of(segments)
        described = [describe([open_receipt(each) for each in receipts], CLASS)] if receipts else []
        self.receipts |= {group.root: receipts for group in described}
        used = [Resource(name=each, digest={DATASET_DIGEST: digest_of(each)}) for each in datasets]
        used += [Resource(name="initial", digest={MODEL_DIGEST: initial})] if initial else []
        stated: dict[str, Any] = {
            "steps": 10 * segments,
            "epochs": 1,
            "nodes": [NODE.address],
            "receipts": described,
        } | training
        return self.put({MODEL_DIGEST: model}, run_record(name, used, Training(**stated)), "model")

    def bundle(self, subject: bytes, *others: Bundle) -> Bundle:
        self.log.sign_head(self.key)
        return collect(self.log, subject, self.receipts, others)


def run_record(name: str, used: list[Resource], training: Training) -> RunRecord:
    return RunRecord(
        build_definition=BuildDefinition(
            external_parameters=JobParameters(job={"lr": 0.1}, policy={"activations": "gaussian"}, program="aa" * 32),
            resolved_dependencies=used,
        ),
        run_details=RunDetails(
            builder=Builder(id="urn:cloister:owner:someone", version={"cloister": "0.1.0"}),
            metadata=RunMetadata(
                invocation_id=name, started_on="2026-01-02T03:04:05Z", finished_on="2026-01-02T03:05:05Z"
            ),
        ),
        cloister_training=training,
    )


def segments_of(count: int, *, node: LocalAccount = NODE, first: int = 0) -> tuple[bytes, ...]:
    states = [digest_of(f"state {first + number}") for number in range(count + 1)]
    return tuple(
        sign_receipt(
            Segment(
                spec="5e" * 32,
                number=number,
                first_step=1 + 10 * (first + number),
                last_step=10 * (first + number + 1),
                leaves=digest_of(f"leaves {number}"),
                state_before=before,
                state_after=after,
                hash="sha256",
            ),
            node,
        )
        for number, (before, after) in enumerate(itertools.pairwise(states))
    )


COST = PrivacyCost(
    data_set="scans", epsilon=4.0, delta=1e-5, relation="replace-one", unit="patient", entries=3, ledger="1e" * 32
)


def model_file(folder: Path) -> tuple[Path, str]:
    path = folder / "model.safetensors"
    save_file({"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "bias": np.ones(2, dtype=np.float32)}, path)
    return path, digest_model(path).root.hex()


def small(folder: Path) -> tuple[Owner, bytes, Path]:
    """An owner whose log holds a whole run: data set, initial and final model, node, run; and the model's file."""
    owner = Owner(folder, 0x11)
    path, model = model_file(folder)
    owner.dataset("scans")
    owner.put({MODEL_DIGEST: digest_of("initial")}, ModelRecord(role="initial", tensors=2, parameters=8), "initial")
    owner.put(
        {"sha256": digest_of("certificate")},
        NodeRecord(address=NODE.address, device="cpu", class_digest=CLASS, software={"torch": "2.13.0"}),
        "node",
        NODE,
    )
    run = owner.run(model, ["scans"], initial=digest_of("initial"), privacy=[COST])
    return owner, run, path


def revocation(owner: Owner, what: Any, digest: dict[str, str], reason: str = "consent was withdrawn") -> bytes:
    return owner.put(digest, RevocationRecord(what=what, reason=reason))
