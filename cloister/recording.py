"""What a finished run puts on record: its data sets, models, nodes, what privacy it spent, and the run itself.

Everything is signed by the owner's key (nodes sign their own), appended to the log, and kept in the run's folder.
Nothing in it lets anybody test a guess of the data (T21): data sets are named by their salted roots, or by a name drawn
for this run; the ledger's position is salted, too.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import itertools
import json
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from client_side.receipts import SignedSegment
from client_side.trainer import Trainer
from cloister.anchoring import Anchoring
from cloister.commands.keys import read_passphrase
from cloister.jobfile import to_json
from cloister.jobs import Job
from cloister.runs import PROVENANCE
from cloister.weights import weights_of, write_whole
from privacy.policy import Policy, treatment_name
from provenance.commitments import load_commitment
from provenance.log import Log
from provenance.models import digest_files, digest_model, tensors_root
from provenance.receipts import describe
from provenance.records import (
    DATASET_DIGEST,
    MODEL_DIGEST,
    BuildDefinition,
    Builder,
    DatasetRecord,
    JobParameters,
    ModelRecord,
    NodeRecord,
    PrivacyCost,
    Receipts,
    ReleaseRecord,
    Resource,
    RunDetails,
    RunMetadata,
    RunRecord,
    Subject,
    Training,
    open_record,
    sign_record,
)
from wire.errors import ConfigError
from wire.state import tensor_digest

if TYPE_CHECKING:
    from eth_account.signers.local import LocalAccount

__all__ = ["Recorder", "Recording"]

_PSEUDONYM: Final = "cloisterPseudonymV1"
_SAFE: Final = 2**53
#: Of the job file: how it was trained. Where, with whose keys and into which folder is nobody's concern.
_TABLES: Final = ("model", "cut", "train", "optimizer", "loss")
_PRIVACY: Final = ("activations", "labels", "gradients", "front", "head", "inference", "epsilon", "delta", "relation")
_KINDS: Final = ("activations", "labels", "gradients", "front", "head", "inference")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What was put on record.

    Attributes:
        run: SHA-256 of the run's record.
        records: how many were signed.
        receipts: that nodes gave.
        log: where they are.
        anchored: where the log's head stands; empty where no anchor is configured.
        settled: whether that is final.
    """

    run: str
    records: int
    receipts: int
    log: str
    anchored: str
    settled: bool

    def told(self) -> str:
        """For people."""
        where = f"; head {self.anchored}" if self.anchored else ""
        late = "" if self.settled else " (not final yet: `cloister anchor push` goes on)"
        return f"on record: {self.records} records, {self.receipts} receipts, in {self.log}{where}{late}"


@dataclass(slots=True)
class _Records:
    """Signed envelopes, by what they are called in the run's folder."""

    signer: LocalAccount
    made: dict[str, bytes] = field(default_factory=dict)

    def add(self, name: str, subject: Subject, predicate: Any) -> None:  # noqa: ANN401 - any of the predicates
        self.made[name] = sign_record(subject, predicate, self.signer)


class Recorder:
    """Puts one run on record when it is over; asks for the key before it begins."""

    def __init__(self, job: Job, model: nn.Module) -> None:
        """Takes the model before it is trained.

        Raises:
            ConfigError, IdentityError: no passphrase, or a wrong one; an anchor that does not say which chain.
            ProvenanceError: the log or a commitment cannot be opened.
        """
        from wire.identity import load_signer  # noqa: PLC0415 - takes more than a second to import

        table = job.provenance
        self._job, self._began = job, _now()
        self._anchoring = None
        if table.anchor is not None:
            self._anchoring = Anchoring(
                table.anchor, table.registry, table.chain_id, None, table.confirmations, table.wait_seconds
            )
            self._anchoring.check()
        secret = None if table.passphrase_file is None else table.passphrase_file.expanduser()
        self._signer = load_signer(job.node.identity.expanduser(), read_passphrase(secret))
        self._commitments = [(path.name, load_commitment(path.expanduser())) for path in table.data_sets]
        self._log = Log(table.log)
        tensors = weights_of(model)
        self._initial = tensors_root({name: tensor_digest(tensor) for name, tensor in tensors.items()}).hex()
        self._tensors, self._parameters = len(tensors), sum(tensor.numel() for tensor in tensors.values())

    def finish(self, trainer: Trainer, model: Path, program: str, *, epochs: int) -> Recording:
        """Signs the records, appends them to the log, keeps them in the run's folder, and anchors.

        Args:
            trainer: at the run's end.
            model: the file.
            program: SHA-256 of the middle's.
            epochs: finished.

        Raises:
            ProvenanceError: the log or the chain fails.
            ConfigError: the folder cannot be written.
        """
        records = _Records(self._signer)
        used = self._inputs(records)
        signed = [] if trainer.receipts is None else trainer.receipts.kept
        groups = list(_groups(signed))
        for number, record in enumerate(dict.fromkeys(each.node_record for each in signed)):
            records.made[f"node-{number}"] = record
        final = digest_model(model)
        subject = Subject(name=model.name, digest={MODEL_DIGEST: final.root.hex()})
        described = ModelRecord(
            role="final", tensors=len(final.tensors), parameters=final.parameters, files=digest_files(model)
        )
        records.add("model", subject, described)
        cost = self._privacy(records, trainer)
        training = Training(
            steps=trainer.state.global_step,
            epochs=epochs,
            nodes=list(dict.fromkeys(group.node for group, _ in groups)),
            privacy=[] if cost is None else [cost],
            receipts=[group for group, _ in groups],
        )
        records.add("run", subject, self._run(used, program, training))
        self._write(model.parent / PROVENANCE, records.made, groups)
        self._log.append(list(records.made.values()))
        anchored, settled = "", True
        if self._anchoring is not None:
            lines, settled = self._anchoring.push(self._log, self._signer)
            anchored = f"{lines[-1].state} on {self._anchoring.to}" if lines else ""
        else:
            self._log.sign_head(self._signer)
        return Recording(
            run=hashlib.sha256(records.made["run"]).hexdigest(),
            records=len(records.made),
            receipts=len(signed),
            log=self._log.name,
            anchored=anchored,
            settled=settled,
        )

    def close(self) -> None:
        """Lets go of the log."""
        self._log.close()

    def _inputs(self, records: _Records) -> list[Resource]:
        used = []
        for number, (name, made) in enumerate(self._commitments):
            digest = {DATASET_DIGEST: made.root}
            records.add(
                f"dataset-{number}",
                Subject(name=name, digest=digest),
                DatasetRecord(kind=made.kind, records=made.records, order=made.order),
            )
            used.append(Resource(name=name, digest=digest))
        digest = {MODEL_DIGEST: self._initial}
        described = ModelRecord(role="initial", tensors=self._tensors, parameters=self._parameters)
        records.add("initial", Subject(name="initial model", digest=digest), described)
        return [*used, Resource(name="initial model", digest=digest)]

    def _privacy(self, records: _Records, trainer: Trainer) -> PrivacyCost | None:
        claim, position = trainer.guard.claim, trainer.guard.position
        if claim is None or position is None or not claim.releases:
            return None
        drawn = secrets.token_hex(32)
        name, digest = (
            (self._commitments[0][0], {DATASET_DIGEST: self._commitments[0][1].root})
            if self._commitments
            else (drawn, {_PSEUDONYM: drawn})
        )
        spent = claim.spent
        cost = PrivacyCost(
            data_set=name,
            epsilon=spent.epsilon if math.isfinite(spent.epsilon) else "infinite",
            delta=spent.delta,
            relation=spent.relation.value,
            unit=spent.unit,
            entries=claim.releases,
            ledger=hashlib.sha256(secrets.token_bytes(32) + position.digest).hexdigest(),
        )
        record = ReleaseRecord(cost=cost, kinds=trainer.guard.releases, claim=list(claim.lines()))
        records.add("release", Subject(name=name, digest=digest), record)
        return cost

    def _run(self, used: Sequence[Resource], program: str, training: Training) -> RunRecord:
        version = {"cloister": metadata.version("cloister"), "torch": str(torch.__version__)}
        return RunRecord(
            build_definition=BuildDefinition(
                external_parameters=JobParameters(
                    job=_job(self._job), policy=_policy(self._job.privacy.policy()), program=program
                ),
                resolved_dependencies=list(used),
            ),
            run_details=RunDetails(
                builder=Builder(id=f"urn:cloister:owner:{self._signer.address}", version=version),
                metadata=RunMetadata(invocation_id=secrets.token_hex(16), started_on=self._began, finished_on=_now()),
            ),
            cloister_training=training,
        )

    def _write(
        self, folder: Path, made: dict[str, bytes], groups: Sequence[tuple[Receipts, list[SignedSegment]]]
    ) -> None:
        try:
            (folder / "receipts").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
        for name, envelope in made.items():
            write_whole(folder / f"{name}.json", envelope)
        for group, signed in groups:
            lines = b"".join(each.receipt.envelope + b"\n" for each in signed)
            write_whole(folder / "receipts" / f"{group.root}.jsonl", lines)


def _groups(signed: Sequence[SignedSegment]) -> list[tuple[Receipts, list[SignedSegment]]]:
    """Receipts by node and session, in the order of their steps."""
    found = []
    for _, part in itertools.groupby(signed, lambda each: (each.receipt.node, each.receipt.segment.spec)):
        group = list(part)
        node = open_record(group[0].node_record).predicate
        of_class = node.class_digest if isinstance(node, NodeRecord) else ""
        found.append((describe([each.receipt for each in group], of_class), group))
    return found


def _policy(policy: Policy) -> dict[str, str]:
    return {kind: treatment_name(kind, getattr(policy, kind)) for kind in _KINDS}


def _job(job: Job) -> dict[str, Any]:
    """The job as it may be shown: no path, no address, no text that its owner gave to a function of their own."""
    told = json.loads(to_json(job))
    shown: dict[str, Any] = {name: told[name] for name in _TABLES}
    shown["model"] = {"factory": told["model"]["factory"], "args": _numbers(told["model"]["args"])}
    shown["data"] = {"train": told["data"]["train"], "args": _numbers(told["data"]["args"])}
    shown["privacy"] = {name: told["privacy"][name] for name in _PRIVACY if told["privacy"][name] is not None}
    safe: dict[str, Any] = _integers(shown)
    return safe


def _numbers(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if isinstance(value, bool | int | float)}


def _integers(value: Any) -> Any:  # noqa: ANN401 - JSON
    """Integers that double precision cannot hold, as text (RFC 8785)."""
    if isinstance(value, dict):
        return {name: _integers(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_integers(each) for each in value]
    return str(value) if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _SAFE else value


def _now() -> str:
    return dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
