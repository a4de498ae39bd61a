"""What is put on record: data sets, models, runs, releases, nodes, verdicts, revocations, as in-toto Statements v1.

A run is a SLSA provenance (v1), a verdict a Simple Verification Result (v0.1), so that tools which know those read
them; the other predicates are Cloister's own, and their type names their version. Their JSON Schemas in ``schemas/``
are generated from the dataclasses here: ``python -m provenance.records FOLDER``. What a schema does not name is
refused: a new field is a new version.

A record states; what of it can be proven stands in ``docs/reference/provenance.md``.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, JsonValue, StringConstraints, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from provenance.envelope import Opened, canonical, open_envelope, seal
from wire.errors import ProvenanceError

if TYPE_CHECKING:
    from eth_account.signers.base import BaseAccount

__all__ = [
    "DATASET_DIGEST",
    "MODEL_DIGEST",
    "PREDICATES",
    "STATEMENT_TYPE",
    "BuildDefinition",
    "Builder",
    "Checkpoint",
    "DatasetRecord",
    "FileDigest",
    "JobParameters",
    "ModelRecord",
    "NodeRecord",
    "PrivacyCost",
    "Receipts",
    "Record",
    "ReleaseRecord",
    "Resource",
    "RevocationRecord",
    "RunDetails",
    "RunMetadata",
    "RunRecord",
    "Subject",
    "Training",
    "VerdictRecord",
    "Verifier",
    "open_record",
    "schemas",
    "sign_record",
]

STATEMENT_TYPE: Final = "https://in-toto.io/Statement/v1"
PAYLOAD_TYPE: Final = "application/vnd.in-toto+json"
#: Names of digests that are Merkle roots and no hash of one file; beside them in-toto's own ``sha256``.
DATASET_DIGEST: Final = "cloisterDatasetV1"
MODEL_DIGEST: Final = "cloisterModelV1"

_MOST: Final = 10_000  # of anything that a record lists: a run with a checkpoint a minute for a week
_CONFIG: Final = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True, allow_inf_nan=False)

Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$")]
Name = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
Text = Annotated[str, StringConstraints(max_length=10_000)]
Uri = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9+.-]*:\S+$", max_length=1000)]
Time = Annotated[str, StringConstraints(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?Z$")]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]  # what JSON's numbers hold
Epsilon = Annotated[float, Field(ge=0)] | Literal["infinite"]
DigestSet = Annotated[dict[Name, Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{2,128}$")]], Field(max_length=8)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a statement is about.

    Attributes:
        name: for people; nothing hangs on it.
        digest: by the name of the algorithm; two statements are about the same thing where a digest is the same.
    """

    __pydantic_config__: ClassVar = _CONFIG
    name: Name
    digest: Annotated[DigestSet, Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetRecord:
    """A data set was committed to; the subject's digest is the salted Merkle root.

    Attributes:
        kind: what its records are made of: files, rows, items.
        records: how many.
        order: ``name`` where records stand in the order of their names, each once, so that absence can be proven.
        description: for people.
        croissant: a description in Croissant (JSON-LD), as its owner gives it.
    """

    __pydantic_config__: ClassVar = _CONFIG
    TYPE: ClassVar = "urn:cloister:dataset:v1"
    kind: Literal["files", "csv", "parquet", "npz", "items"]
    records: Count
    order: Literal["name", "position"]
    description: Text = ""
    croissant: dict[str, JsonValue] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigest:
    """A file of a model, as OpenSSF Model Signing lists it: SHA-256 of its bytes."""

    __pydantic_config__: ClassVar = _CONFIG
    name: Name
    sha256: Hex32
    bytes: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecord:
    """A model's weights; the subject's digest is the Merkle root over its named tensors, whatever file holds them.

    Attributes:
        role: where in a run it stands.
        tensors: how many.
        parameters: elements of all tensors.
        files: the files in which it was published, if it was.
    """

    __pydantic_config__: ClassVar = _CONFIG
    TYPE: ClassVar = "urn:cloister:model:v1"
    role: Literal["initial", "checkpoint", "final", "other"]
    tensors: Count
    parameters: Count
    files: Annotated[list[FileDigest], Field(max_length=_MOST)] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """What a run consumed: a data set, an initial model."""

    __pydantic_config__: ClassVar = _CONFIG
    name: Name
    digest: Annotated[DigestSet, Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobParameters:
    """What its owner asked of a run.

    Attributes:
        job: the job file's content, without what is secret or of this machine alone.
        policy: kind of release to the name of its treatment.
        program: SHA-256 of the middle's program.
    """

    __pydantic_config__: ClassVar = _CONFIG
    job: dict[str, JsonValue]
    policy: dict[Name, Name]
    program: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildDefinition:
    """SLSA's: from what the model was made."""

    __pydantic_config__: ClassVar = _CONFIG
    external_parameters: JobParameters
    resolved_dependencies: Annotated[list[Resource], Field(max_length=_MOST)]
    build_type: Literal["urn:cloister:training:v1"] = "urn:cloister:training:v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Builder:
    """SLSA's: who made it. ``id`` names the owner's address; ``version`` is by package."""

    __pydantic_config__: ClassVar = _CONFIG
    id: Uri
    version: dict[Name, Name]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetadata:
    """SLSA's: which run, and when, by the owner's clock."""

    __pydantic_config__: ClassVar = _CONFIG
    invocation_id: Name
    started_on: Time
    finished_on: Time


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDetails:
    """SLSA's: the circumstances."""

    __pydantic_config__: ClassVar = _CONFIG
    builder: Builder
    metadata: RunMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyCost:
    """What a data set had spent, by all runs together, when this was written.

    Attributes:
        data_set: its name or digest in the privacy ledger.
        epsilon: or ``"infinite"``.
        delta: at which it is told.
        relation: which data sets count as neighbours.
        unit: whose contribution is protected.
        entries: releases in the ledger.
        ledger: digest of the latest of them, which chains them all.
    """

    __pydantic_config__: ClassVar = _CONFIG
    data_set: Name
    epsilon: Epsilon
    delta: Annotated[float, Field(gt=0, lt=1)]
    relation: Name
    unit: Name
    entries: Count
    ledger: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipts:
    """What nodes signed of the run's segments.

    Attributes:
        node: address of the node that signed them.
        spec: SHA-256 of what its session was opened with.
        root: Merkle root over its signed receipts, in their order; see :mod:`provenance.receipts`.
        segments: how many.
        first_step: that the first of them covers.
        last_step: that the last of them covers.
        hash: of the wire bytes and states.
        class_digest: SHA-256 of the determinism class that the job's spec names.
    """

    __pydantic_config__: ClassVar = _CONFIG
    node: Address
    spec: Hex32
    root: Hex32
    segments: Count
    first_step: Count
    last_step: Count
    hash: Literal["sha256", "blake3"]
    class_digest: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A state that the run passed through; ``digest`` is the Merkle root over its tensors."""

    __pydantic_config__: ClassVar = _CONFIG
    step: Count
    digest: Hex32


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """What SLSA has no words for.

    Attributes:
        steps: of the optimizer.
        epochs: finished.
        nodes: address of each node that served the middle, in order.
        privacy: of each data set; empty where nothing is accounted.
        receipts: of each node that gave any; empty where none did.
        checkpoints: in their order.
    """

    __pydantic_config__: ClassVar = _CONFIG
    steps: Count
    epochs: Count
    nodes: Annotated[list[Address], Field(max_length=_MOST)]
    privacy: Annotated[list[PrivacyCost], Field(max_length=_MOST)] = field(default_factory=list)
    receipts: Annotated[list[Receipts], Field(max_length=_MOST)] = field(default_factory=list)
    checkpoints: Annotated[list[Checkpoint], Field(max_length=_MOST)] = field(default_factory=list)


def _slsa_name(name: str) -> str:
    return name if name.startswith("cloister_") else to_camel(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRecord:
    """A finished run; the subject is the final model. ``cloister_training`` is named as SLSA asks of extensions."""

    __pydantic_config__: ClassVar = ConfigDict(
        alias_generator=_slsa_name, extra="forbid", strict=True, allow_inf_nan=False
    )
    TYPE: ClassVar = "https://slsa.dev/provenance/v1"
    build_definition: BuildDefinition
    run_details: RunDetails
    cloister_training: Training


@dataclass(frozen=True, slots=True, kw_only=True)
class ReleaseRecord:
    """What was released of a data set, by all its runs; the subject is the data set.

    Attributes:
        cost: in all.
        kinds: how many releases of each kind.
        claim: the sentences that may be said of it.
    """

    __pydantic_config__: ClassVar = _CONFIG
    TYPE: ClassVar = "urn:cloister:release:v1"
    cost: PrivacyCost
    kinds: dict[Name, Count]
    claim: Annotated[list[Text], Field(max_length=100)]


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeRecord:
    """A node speaks for itself; the subject's digest is its TLS certificate's.

    Attributes:
        address: of its signing key, which signs this.
        device: what it computes on.
        class_digest: SHA-256 of its determinism class.
        software: versions by package.
    """

    __pydantic_config__: ClassVar = _CONFIG
    TYPE: ClassVar = "urn:cloister:node:v1"
    address: Address
    device: Name
    class_digest: Hex32
    software: dict[Name, Name]


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifier:
    """Who checked: a URI that names the verifier and its version."""

    __pydantic_config__: ClassVar = _CONFIG
    id: Uri


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictRecord:
    """What a verifier found to hold of the subject; what did not hold is not listed."""

    __pydantic_config__: ClassVar = _CONFIG
    TYPE: ClassVar = "https://in-toto.io/attestation/svr/v0.1"
    verifier: Verifier
    time_created: Time
    properties: Annotated[list[Name], Field(max_length=_MOST)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RevocationRecord:
    """The subject counts no more from its place in the log on: a key, a record, a data set, a model.

    Only who signed the revoked record, or the key itself, revokes it; a verifier says so of any other.

    Attributes:
        what: a ``key`` is named by the subject's ``address`` digest (hexadecimal, without 0x), a ``record`` by the
            ``sha256`` of its envelope, the others by their own digests.
        reason: for people.
    """

    __pydantic_config__: ClassVar = _CONFIG
    TYPE: ClassVar = "urn:cloister:revocation:v1"
    what: Literal["key", "record", "dataset", "model"]
    reason: Text


Predicate = DatasetRecord | ModelRecord | RunRecord | ReleaseRecord | NodeRecord | VerdictRecord | RevocationRecord
_KINDS: Final[tuple[type[Predicate], ...]] = (
    DatasetRecord,
    ModelRecord,
    RunRecord,
    ReleaseRecord,
    NodeRecord,
    VerdictRecord,
    RevocationRecord,
)
PREDICATES: Final[dict[str, type[Predicate]]] = {kind.TYPE: kind for kind in _KINDS}
_SUBJECTS: Final = TypeAdapter(Annotated[list[Subject], Field(min_length=1, max_length=_MOST)])
_ADAPTERS: Final[dict[str, TypeAdapter[Any]]] = {uri: TypeAdapter(kind) for uri, kind in PREDICATES.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A signed statement.

    Attributes:
        subject: what it is about.
        predicate: what is stated.
        signer: address of the key that signed.
    """

    subject: tuple[Subject, ...]
    predicate: Predicate
    signer: str


def sign_record(subject: Subject | list[Subject], predicate: Predicate, signer: BaseAccount) -> bytes:
    """The record's envelope, as it goes into the log.

    Raises:
        ProvenanceError: a value that the schema does not allow; says which.
    """
    subjects = [subject] if isinstance(subject, Subject) else subject
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": _SUBJECTS.dump_python(subjects, by_alias=True, warnings=False),
        "predicateType": predicate.TYPE,
        "predicate": _ADAPTERS[predicate.TYPE].dump_python(predicate, by_alias=True, exclude_none=True, warnings=False),
    }
    _parse(Opened(statement, signer.address))
    return seal(statement, PAYLOAD_TYPE, signer)


def open_record(envelope: bytes) -> Record:
    """The record in an envelope, which may be anybody's, once its signature and its schema hold.

    Raises:
        ProvenanceError: naming the part that is wrong.
    """
    return _parse(open_envelope(envelope, PAYLOAD_TYPE))


def schemas() -> dict[str, str]:
    """A JSON Schema of each predicate, by its file's name."""
    made = {}
    for uri, adapter in _ADAPTERS.items():
        name = re.sub(r"(?<!^)(?=[A-Z])", "-", PREDICATES[uri].__name__).lower()
        schema = {"$id": f"urn:cloister:schema:{name}:v1", **adapter.json_schema(by_alias=True)}
        made[f"{name}.json"] = json.dumps(schema, indent=2, ensure_ascii=False, sort_keys=True) + "\n"
    return made


def _parse(opened: Opened) -> Record:
    statement = opened.payload
    if not isinstance(statement, dict) or set(statement) != {"_type", "subject", "predicateType", "predicate"}:
        raise ProvenanceError("the payload is no in-toto statement: _type, subject, predicateType and predicate")
    if statement["_type"] != STATEMENT_TYPE:
        raise ProvenanceError(f"the payload's _type is not {STATEMENT_TYPE}")
    kind = statement["predicateType"]
    if not isinstance(kind, str) or kind not in PREDICATES:
        raise ProvenanceError(f"a predicate of type {str(kind)[:100]!r}: this version knows {', '.join(PREDICATES)}")
    try:
        # As JSON: what is strict there is Python's own types elsewhere.
        subject = _SUBJECTS.validate_json(canonical(statement["subject"]))
        predicate = _ADAPTERS[kind].validate_json(canonical(statement["predicate"]))
    except (ValidationError, RecursionError) as error:
        raise ProvenanceError(f"the record is no {kind}: {_first(error)}") from error
    return Record(subject=tuple(subject), predicate=predicate, signer=opened.signer)


def _first(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "too deep"
    found = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part)[:100] for part in found['loc'])}: {found['msg'][:200]}"


if __name__ == "__main__":
    for file, text in schemas().items():
        Path(sys.argv[1], file).write_text(text, encoding="utf-8")
