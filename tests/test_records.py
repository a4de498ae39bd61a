"""Records and envelopes: one encoding, one signature, strict schemas, and no altered byte passes (THREATS T20, T22)."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from eth_account import Account
from google.protobuf import json_format
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementPb

from provenance.envelope import MAX_ENVELOPE_BYTES, canonical, open_envelope, seal
from provenance.records import (
    DATASET_DIGEST,
    MODEL_DIGEST,
    PREDICATES,
    BuildDefinition,
    Builder,
    Checkpoint,
    DatasetRecord,
    FileDigest,
    JobParameters,
    ModelRecord,
    NodeRecord,
    Predicate,
    PrivacyCost,
    Receipts,
    ReleaseRecord,
    Resource,
    RevocationRecord,
    RunDetails,
    RunMetadata,
    RunRecord,
    Subject,
    Training,
    VerdictRecord,
    Verifier,
    open_record,
    schemas,
    sign_record,
)
from wire.errors import ProvenanceError

ROOT = Path(__file__).resolve().parents[1]
SIGNER = Account.from_key("0x" + "11" * 32)
OTHER = Account.from_key("0x" + "22" * 32)
HEX = "ab" * 32
SUBJECT = Subject(name="scans", digest={DATASET_DIGEST: HEX})
COST = PrivacyCost(
    data_set="scans", epsilon=4.0, delta=1e-5, relation="replace-one", unit="patient", entries=3, ledger=HEX
)
RECEIPTS = Receipts(
    node=OTHER.address, spec=HEX, root=HEX, segments=10, first_step=0, last_step=639, hash="sha256", class_digest=HEX
)
RUN = RunRecord(
    build_definition=BuildDefinition(
        external_parameters=JobParameters(
            job={"train": {"epochs": 3, "lr": 0.1, "seed": "18446744073709551615", "note": None}},
            policy={"activations": "gaussian"},
            program=HEX,
        ),
        resolved_dependencies=[
            Resource(name="scans", digest={DATASET_DIGEST: HEX}),
            Resource(name="initial", digest={MODEL_DIGEST: HEX}),
        ],
    ),
    run_details=RunDetails(
        builder=Builder(id=f"urn:cloister:owner:{SIGNER.address}", version={"cloister": "0.1.0"}),
        metadata=RunMetadata(
            invocation_id="run-1", started_on="2026-01-02T03:04:05Z", finished_on="2026-01-02T03:05:05.25Z"
        ),
    ),
    cloister_training=Training(
        steps=640,
        epochs=3,
        nodes=[OTHER.address],
        privacy=[COST],
        receipts=[RECEIPTS],
        checkpoints=[Checkpoint(step=320, digest=HEX)],
    ),
)
RECORDS: list[Predicate] = [
    DatasetRecord(kind="files", records=17, order="name", croissant={"@type": "sc:Dataset", "name": "Ψ"}),
    ModelRecord(
        role="final", tensors=2, parameters=10, files=[FileDigest(name="model.safetensors", sha256=HEX, bytes=99)]
    ),
    RUN,
    ReleaseRecord(cost=COST, kinds={"activations": 3}, claim=["ε = 4 at δ = 1e-05"]),
    NodeRecord(address=SIGNER.address, device="cpu", class_digest=HEX, software={"torch": "2.13.0"}),
    VerdictRecord(
        verifier=Verifier(id="urn:cloister:verifier:0.1.0"),
        time_created="2026-01-02T03:04:05Z",
        properties=["CLOISTER_REPLAYED"],
    ),
    RevocationRecord(what="dataset", reason="consent was withdrawn"),
]


def payload_of(envelope: bytes) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(base64.b64decode(json.loads(envelope)["payload"]))
    return read


def forged(statement: object) -> bytes:
    """An envelope that is right but for what it says."""
    return seal(statement, "application/vnd.in-toto+json", SIGNER)


@pytest.mark.parametrize("predicate", RECORDS, ids=lambda record: type(record).__name__)
def test_a_record_comes_back_as_it_was_signed(predicate: Predicate) -> None:
    record = open_record(sign_record(SUBJECT, predicate, SIGNER))

    assert (record.predicate, record.subject, record.signer) == (predicate, (SUBJECT,), SIGNER.address)


def test_there_is_a_record_of_every_kind_here() -> None:
    assert {type(record) for record in RECORDS} == set(PREDICATES.values())


@pytest.mark.parametrize("predicate", RECORDS, ids=lambda record: type(record).__name__)
def test_what_is_signed_fits_its_json_schema_and_is_a_statement_for_in_totos_own_library(predicate: Predicate) -> None:
    statement = payload_of(sign_record(SUBJECT, predicate, SIGNER))

    made = {schema["title"]: schema for schema in map(json.loads, schemas().values())}
    schema = made[type(predicate).__name__]
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.Draft202012Validator(schema).validate(statement["predicate"])
    parsed = Statement.copy_from_pb(json_format.ParseDict(statement, StatementPb()))
    parsed.validate()


def test_the_schemas_in_the_repository_are_those_of_the_dataclasses() -> None:
    stored = {path.name: path.read_text("utf-8") for path in (ROOT / "provenance" / "schemas").glob("*.json")}

    assert stored == schemas(), "run `python -m provenance.records provenance/schemas` and commit what changed"


def test_T22_no_altered_byte_of_an_envelope_passes() -> None:
    envelope = sign_record(SUBJECT, RECORDS[-1], SIGNER)
    for position in range(len(envelope)):
        for flip in (0x01, 0x80):
            bad = bytearray(envelope)
            bad[position] ^= flip
            with pytest.raises(ProvenanceError):
                open_record(bytes(bad))
    for cut in (0, 1, len(envelope) // 2, len(envelope) - 1):
        with pytest.raises(ProvenanceError):
            open_record(envelope[:cut])
    with pytest.raises(ProvenanceError):
        open_record(envelope + b"\n")


def test_T22_the_other_signature_of_the_same_key_is_refused() -> None:
    envelope = json.loads(sign_record(SUBJECT, RECORDS[-1], SIGNER))
    signature = bytearray(base64.b64decode(envelope["signatures"][0]["sig"]))
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    twin = (order - int.from_bytes(signature[32:64], "big")).to_bytes(32, "big")
    signature[32:64] = twin
    signature[64] = 55 - signature[64]
    envelope["signatures"][0]["sig"] = base64.b64encode(signature).decode()

    with pytest.raises(ProvenanceError, match="low s"):
        open_record(canonical(envelope))


def test_T22_anothers_name_on_a_signature_is_refused() -> None:
    envelope = json.loads(sign_record(SUBJECT, RECORDS[-1], SIGNER))
    envelope["signatures"][0]["keyid"] = OTHER.address

    with pytest.raises(ProvenanceError, match=f"signature is not of {OTHER.address}"):
        open_record(canonical(envelope))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.update(more=1), "no in-toto statement"),
        (lambda s: s.update(_type="https://in-toto.io/Statement/v0.1"), "_type is not"),
        (lambda s: s.update(predicateType="urn:cloister:revocation:v2"), "this version knows"),
        (lambda s: s.update(predicateType=["urn"]), "this version knows"),
        (lambda s: s["predicate"].update(extra=1), "extra: "),
        (lambda s: s["predicate"].update(what="everything"), "what: "),
        (lambda s: s["predicate"].update(reason="x" * 10_001), "reason: "),
        (lambda s: s["predicate"].pop("reason"), "reason: "),
        (lambda s: s.update(predicate=None), "no urn:cloister:revocation:v1"),
        (lambda s: s.update(subject=[]), "at least 1 item"),
        (lambda s: s["subject"][0].update(digest={}), "digest: "),
        (lambda s: s["subject"][0]["digest"].update(sha256="XYZ"), "digest"),
    ],
)
def test_a_record_that_is_none_is_refused_by_the_part_that_is_wrong(change: Any, complaint: str) -> None:
    statement = payload_of(sign_record(SUBJECT, RECORDS[-1], SIGNER))
    change(statement)

    with pytest.raises(ProvenanceError, match=complaint):
        open_record(forged(statement))


def test_a_record_that_its_own_schema_forbids_is_not_signed() -> None:
    with pytest.raises(ProvenanceError, match="records: "):
        sign_record(SUBJECT, DatasetRecord(kind="files", records=-1, order="name"), SIGNER)
    cost = PrivacyCost(data_set="a", epsilon=float("nan"), delta=1e-5, relation="r", unit="u", entries=1, ledger=HEX)
    with pytest.raises(ProvenanceError, match=r"no canonical JSON|delta|epsilon"):
        sign_record(SUBJECT, ReleaseRecord(cost=cost, kinds={}, claim=[]), SIGNER)


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
        b'{"payload":"","payload":"","payloadType":"","signatures":[]}',
        b'{"payload":1,"payloadType":"application/vnd.in-toto+json","signatures":[]}',
        b"1" * 100_000,
        b"NaN",
        b'{"a": 1}',
        b'"\\ud800"',
    ],
    ids=range(12),
)
def test_T02_hostile_envelopes_get_the_documented_error(hostile: bytes) -> None:
    with pytest.raises(ProvenanceError):
        open_record(hostile)


def test_T02_an_envelope_beyond_the_limit_is_not_parsed_and_not_written() -> None:
    with pytest.raises(ProvenanceError, match="at most"):
        open_envelope(b" " * (MAX_ENVELOPE_BYTES + 1), "x")
    with pytest.raises(ProvenanceError, match="at most"):
        seal({"x": "y" * MAX_ENVELOPE_BYTES}, "x", SIGNER)


def test_integers_beyond_json_are_refused_and_text_is_not_confused_with_another_type() -> None:
    with pytest.raises(ProvenanceError, match="no canonical JSON"):
        seal({"seed": 2**60}, "x", SIGNER)
    with pytest.raises(ProvenanceError, match="of another type"):
        open_envelope(seal({}, "x", SIGNER), "y")


def test_an_auditor_needs_no_torch() -> None:
    modules = "anchors,chain,commitments,devchain,envelope,log,merkle,models,records,sources"
    script = (
        f"import sys, {', '.join('provenance.' + m for m in modules.split(','))}\n"
        "print(sorted({'torch', 'opacus', 'sklearn', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT, capture_output=True, text=True)

    assert done.stdout.strip() == "[]"
