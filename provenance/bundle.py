"""A bundle: one file with all that an auditor needs of a run, and nothing of its data or weights.

A zip of canonical JSON, stored as it is and in one order, so that a bundle has one encoding: what its reader would not
write again byte for byte is refused, and nothing is ever unpacked to more than the file's own size. It is signed by
nobody: each part carries its own proof, and :mod:`provenance.verification` says which.

=================================  ====================================================================================
``bundle.json``                    version, subject, and each other file's SHA-256 and size
``records/<SHA-256>.json``         a record's envelope, as it stands in a log
``logs/<log>/head.json``           a signed tree head of a log that holds some of the records
``logs/<log>/proofs.json``         where in it they stand, and where its heads were anchored: :class:`Proofs`
``receipts/<root>.jsonl``          the signed receipts that a run's record has the root of, a line each
=================================  ====================================================================================
"""

from __future__ import annotations

import hashlib
import io
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, StringConstraints, TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from provenance.envelope import canonical, parse_json
from provenance.merkle import MAX_LEAVES
from provenance.receipts import MAX_SEGMENTS
from wire.errors import ConfigError, ProvenanceError
from wire.files import replace_file

__all__ = [
    "MAX_BUNDLE_BYTES",
    "MAX_BUNDLE_FILES",
    "AnchorPoint",
    "Bundle",
    "LogPart",
    "Place",
    "Proofs",
    "bundle_bytes",
    "load_bundle",
    "parse_bundle",
    "save_bundle",
]

MAX_BUNDLE_BYTES: Final = 64 * 2**20  # 50,000 receipts and 10,000 records of the usual size
MAX_BUNDLE_FILES: Final = 10_000
_MANIFEST: Final = "bundle.json"
_NAME: Final = re.compile(
    r"bundle\.json|records/[0-9a-f]{64}\.json|receipts/[0-9a-f]{64}\.jsonl|logs/[0-9a-f]{64}/(head|proofs)\.json"
)
_END: Final = struct.Struct("<4sHHHHIIH")  # the end of a zip's central directory
_THEN: Final = (1980, 1, 1, 0, 0, 0)  # the zip's own times say nothing
_LONGEST_ENTRY: Final = 46 + 96  # of the central directory: its fixed part, and a name

_CONFIG: Final = ConfigDict(alias_generator=to_camel, extra="forbid", strict=True)
Hex32 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Address = Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$")]
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Path32 = Annotated[list[Hex32], Field(max_length=128)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a record stands in a log: RFC 9162's inclusion proof into the bundle's head of that log.

    Attributes:
        record: SHA-256 of its envelope.
        index: its number.
        path: the proof.
    """

    __pydantic_config__: ClassVar = _CONFIG
    record: Hex32
    index: Annotated[int, Field(ge=0, lt=MAX_LEAVES)]
    path: Path32


@dataclass(frozen=True, slots=True, kw_only=True)
class AnchorPoint:
    """Where a head of the log was put on a chain: a pointer, which proves nothing until a chain is asked.

    Attributes:
        chain_id: EIP-155's.
        registry: the contract's address.
        opener: address that opened the log there; with the log's id it makes the registry's.
        size: records that the anchored head covers.
        root: of that head.
        path: RFC 9162's consistency proof from it to the bundle's head of the log.
        block: number.
        block_hash: so that a block of another chain, or one that fell out, is not taken for it.
        block_time: seconds since 1970.
    """

    __pydantic_config__: ClassVar = _CONFIG
    chain_id: Count
    registry: Address
    opener: Address
    size: Annotated[int, Field(ge=1, le=MAX_LEAVES)]
    root: Hex32
    path: Path32
    block: Count
    block_hash: Hex32
    block_time: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Proofs:
    """What ``proofs.json`` holds."""

    __pydantic_config__: ClassVar = _CONFIG
    places: Annotated[list[Place], Field(max_length=MAX_BUNDLE_FILES)]
    anchors: Annotated[list[AnchorPoint], Field(max_length=100)] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPart:
    """What a bundle holds of one log.

    Attributes:
        head: envelope of a signed tree head; see :func:`provenance.log.open_head`.
        proofs: into it.
    """

    head: bytes
    proofs: Proofs


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """All of a bundle; nothing of it is verified yet.

    Attributes:
        subject: SHA-256 of the record that it is about: a run's, as a rule.
        records: envelopes, by their SHA-256.
        logs: by the log's id.
        receipts: signed receipts in their order, by the root over them.
    """

    subject: str
    records: Mapping[str, bytes]
    logs: Mapping[str, LogPart]
    receipts: Mapping[str, Sequence[bytes]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class _File:
    __pydantic_config__: ClassVar = _CONFIG
    name: Annotated[str, StringConstraints(pattern=f"^({_NAME.pattern})$")]
    sha256: Hex32
    bytes: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class _Manifest:
    __pydantic_config__: ClassVar = _CONFIG
    subject: Hex32
    files: Annotated[list[_File], Field(max_length=MAX_BUNDLE_FILES)]
    version: Literal[1] = 1


_PROOFS: Final = TypeAdapter(Proofs)
_MANIFESTS: Final = TypeAdapter(_Manifest)


def bundle_bytes(bundle: Bundle) -> bytes:
    """The file; the same bundle always gives the same bytes.

    Raises:
        ProvenanceError: it is larger than a bundle may be.
    """
    files = {f"records/{digest}.json": envelope for digest, envelope in bundle.records.items()}
    for name, part in bundle.logs.items():
        files[f"logs/{name}/head.json"] = part.head
        files[f"logs/{name}/proofs.json"] = canonical(_PROOFS.dump_python(part.proofs, by_alias=True))
    for root, envelopes in bundle.receipts.items():
        files[f"receipts/{root}.jsonl"] = b"".join(envelope + b"\n" for envelope in envelopes)
    listed = [
        _File(name=name, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
        for name, content in sorted(files.items())
    ]
    manifest = canonical(_MANIFESTS.dump_python(_Manifest(subject=bundle.subject, files=listed), by_alias=True))
    made = _zipped({_MANIFEST: manifest} | files)
    if len(made) > MAX_BUNDLE_BYTES or len(files) >= MAX_BUNDLE_FILES:
        raise ProvenanceError(
            f"a bundle of {len(made)} bytes in {len(files) + 1} files; at most {MAX_BUNDLE_BYTES} in {MAX_BUNDLE_FILES}"
        )
    return made


def save_bundle(bundle: Bundle, path: Path) -> int:
    """Writes the file, whole or not at all; returns its bytes.

    Raises:
        ConfigError: it cannot be written.
        ProvenanceError: see :func:`bundle_bytes`.
    """
    made = bundle_bytes(bundle)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, made)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}; choose another place with --out") from error
    return len(made)


def load_bundle(path: Path) -> Bundle:
    """The bundle in a file, which may be anybody's.

    Raises:
        ConfigError: there is no such file.
        ProvenanceError: see :func:`parse_bundle`.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    return parse_bundle(data)


def parse_bundle(data: bytes) -> Bundle:
    """The bundle in a file's bytes, which may be anybody's. Each part is as the manifest says; nothing more is known.

    Raises:
        ProvenanceError: naming the part that is none of a bundle's, too large, or altered.
    """
    files = _unzipped(data)
    manifest = _parsed(_MANIFESTS, files.pop(_MANIFEST, b""), _MANIFEST)
    listed = {file.name: file for file in manifest.files}
    if [file.name for file in manifest.files] != sorted(files):
        odd = sorted(set(listed) ^ set(files))
        raise ProvenanceError(
            f"the bundle's {(odd or [_MANIFEST])[0]}: not the files that {_MANIFEST} lists, each once"
        )
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != listed[name].sha256 or len(content) != listed[name].bytes:
            raise ProvenanceError(f"the bundle's {name} was altered: it is not what {_MANIFEST} says")
    records = _records(files)
    if manifest.subject not in records:
        raise ProvenanceError(f"the bundle's {_MANIFEST}: its subject is none of its records")
    return Bundle(
        subject=manifest.subject,
        records=records,
        logs=_logs(files),
        receipts={
            _stem(name): _lines(name, content) for name, content in files.items() if name.startswith("receipts/")
        },
    )


def _records(files: Mapping[str, bytes]) -> dict[str, bytes]:
    found = {_stem(name): content for name, content in files.items() if name.startswith("records/")}
    for digest, envelope in found.items():
        if hashlib.sha256(envelope).hexdigest() != digest:
            raise ProvenanceError(f"the bundle's records/{digest}.json is another record than its name says")
    return found


def _logs(files: Mapping[str, bytes]) -> dict[str, LogPart]:
    names = sorted({name.split("/")[1] for name in files if name.startswith("logs/")})
    found = {}
    for name in names:
        head, proofs = (files.get(f"logs/{name}/{part}.json") for part in ("head", "proofs"))
        if head is None or proofs is None:
            raise ProvenanceError(f"the bundle's logs/{name} lacks its head or its proofs")
        found[name] = LogPart(head=head, proofs=_parsed(_PROOFS, proofs, f"logs/{name}/proofs.json"))
    return found


def _lines(name: str, content: bytes) -> tuple[bytes, ...]:
    lines = content.split(b"\n")
    if lines.pop() != b"" or len(lines) > MAX_SEGMENTS:
        raise ProvenanceError(f"the bundle's {name} is no list of at most {MAX_SEGMENTS} receipts, a line each")
    return tuple(lines)


def _stem(name: str) -> str:
    return name.rsplit("/", 1)[1].partition(".")[0]


def _parsed(adapter: TypeAdapter[Any], data: bytes, name: str) -> Any:  # noqa: ANN401 - the adapter's
    try:
        parse_json(data, f"the bundle's {name}", limit=MAX_BUNDLE_BYTES)
        return adapter.validate_json(data)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part)[:100] for part in found["loc"])
        raise ProvenanceError(f"the bundle's {name}: {where}: {found['msg'][:200]}") from error


def _zipped(files: Mapping[str, bytes]) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED, allowZip64=False) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _THEN)
            entry.create_system = 3  # on every system
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, files[name])
    return made.getvalue()


def _unzipped(data: bytes) -> dict[str, bytes]:
    """The files of a zip as :func:`_zipped` writes it. Its directory is bounded before it is read."""
    _check_end(data)
    files: dict[str, bytes] = {}
    name = "directory"
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            listed = archive.infolist()
            if sum(entry.file_size for entry in listed) > len(data):  # entries that share their bytes
                raise ProvenanceError("the bundle's files are larger than the bundle")
            for entry in listed:
                if not _NAME.fullmatch(entry.filename) or entry.filename in files:
                    raise ProvenanceError(f"the bundle holds {entry.filename[:100]!r}, which is no part of a bundle")
                name = entry.filename
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise ProvenanceError(f"the bundle's {name} is packed or of another size than it says")
                files[name] = archive.read(entry)
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OSError,
        EOFError,
        struct.error,
    ) as error:
        raise ProvenanceError(f"the bundle's {name} cannot be read from the archive: {str(error)[:200]}") from error
    if _zipped(files) != data:
        raise ProvenanceError("the bundle's archive was altered: its directory or headers are not as they are written")
    return files


def _check_end(data: bytes) -> None:
    if len(data) > MAX_BUNDLE_BYTES:
        raise ProvenanceError(f"more than {MAX_BUNDLE_BYTES} bytes: no bundle is that large")
    if len(data) < _END.size:
        raise ProvenanceError("this is no bundle: it is no zip archive")
    magic, *_, entries, directory, _offset, comment = _END.unpack(data[-_END.size :])
    large = data[-_END.size - 20 :][:4] == b"PK\x06\x07"  # ZIP64's locator, which would overrule these numbers
    if magic != b"PK\x05\x06" or comment or large:
        raise ProvenanceError("this is no bundle: no zip archive, cut off, or with something behind its end")
    if entries > MAX_BUNDLE_FILES or directory > entries * _LONGEST_ENTRY:
        raise ProvenanceError(f"the bundle's directory lists {entries} files; at most {MAX_BUNDLE_FILES} are read")
