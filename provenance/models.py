"""A model's digests: one Merkle root over its named tensors, and OpenSSF Model Signing's over its files.

The root is over tensors, not over a file: the same weights saved twice, in another order or with other metadata, have
one root, and one tensor can be proven alone. Read from safetensors in blocks, without torch.

Model Signing (OMS v1.0) signs SHA-256 of every file; :func:`sign_files` writes the ``model.sig`` that
``model_signing verify key`` takes, with the identity's TLS key (ECDSA P-256), since OMS knows no Ethereum keys.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from safetensors import SafetensorError, safe_open

from provenance.envelope import canonical
from provenance.merkle import leaf_hash, root_of
from provenance.records import FileDigest
from wire.errors import ConfigError, IdentityError, ProvenanceError

__all__ = ["ModelDigest", "digest_files", "digest_model", "sign_files", "tensors_root"]

_BLOCK: Final = 2**20
_MAX_HEADER_BYTES: Final = 100_000_000  # safetensors' own limit
_DOMAIN: Final = b"cloister model v1\x00"
_DTYPES: Final = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
}
_OMS_TYPE: Final = "https://model_signing/signature/v1.0"
_OMS_IGNORED: Final = (".git", ".gitattributes", ".github", ".gitignore")  # as model_signing leaves out by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDigest:
    """A model file's tensors.

    Attributes:
        root: Merkle root over them.
        tensors: each one's SHA-256 over ``dtype|shape|`` and its little-endian content, by name.
        parameters: elements of all of them.
    """

    root: bytes
    tensors: dict[str, bytes]
    parameters: int


def tensors_root(tensors: dict[str, bytes]) -> bytes:
    """The root over tensors' digests, in the order of their names as UTF-8."""
    named = sorted((name.encode(), digest) for name, digest in tensors.items())
    return root_of(leaf_hash(_DOMAIN + len(name).to_bytes(4, "big") + name + digest) for name, digest in named)


def digest_model(path: Path) -> ModelDigest:
    """The digest of a safetensors file, which may be anybody's; constant memory, whatever its size.

    Raises:
        ProvenanceError: it is none, or holds a dtype that Cloister does not train.
    """
    try:
        with safe_open(path, framework="np") as file:  # checks that the tensors lie within the file, side by side
            names = list(file.keys())
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
            return _digest(stream, header, names, 8 + length)
    except (OSError, SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ProvenanceError(f"{path} is no safetensors file: {error}") from error


def digest_files(root: Path, *, without: Iterable[str] = ()) -> list[FileDigest]:
    """SHA-256 of a model's files as OMS lists them: all under a folder but git's own, or the one file.

    Args:
        root: folder or file.
        without: paths below the folder that are not the model's, such as the signature.

    Raises:
        ProvenanceError: there is a link, or a file cannot be read.
    """
    left_out = {*without, *_OMS_IGNORED}
    paths = sorted(root.rglob("*")) if root.is_dir() else [root]
    found = []
    for path in paths:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name
        if name in left_out or name.split("/")[0] in left_out or (path.is_dir() and not path.is_symlink()):
            continue
        if path.is_symlink() or not path.is_file():
            raise ProvenanceError(f"{path} is a link or no regular file: a published model is files alone")
        try:
            with path.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise ProvenanceError(f"cannot read {path}: {error.strerror}") from error
        found.append(FileDigest(name=name, sha256=digest, bytes=path.stat().st_size))
    return sorted(found, key=lambda file: file.name)


def sign_files(root: Path, private_key_pem: bytes, signature: Path) -> None:
    """Writes the OMS signature of a model's files: a Sigstore bundle around a DSSE envelope.

    Args:
        root: the model's folder, or its one file.
        private_key_pem: an ECDSA key on P-256, P-384 or P-521, such as the identity's TLS key.
        signature: where to, usually ``model.sig`` in the folder; it is no part of the model.

    Raises:
        IdentityError: the key is none of these.
        ConfigError: the signature cannot be written.
    """
    key = _key(private_key_pem)
    inside = signature.resolve().is_relative_to(root.resolve()) and root.is_dir()
    ours = [signature.resolve().relative_to(root.resolve()).as_posix()] if inside else []
    body = canonical(_oms_statement(root, ours))
    kind = "application/vnd.in-toto+json"
    signed = key.sign(b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(body), body), ec.ECDSA(_hash_of(key)))
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    bundle = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "publicKey": {"hint": hashlib.sha256(public).hexdigest()},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": base64.b64encode(body).decode("ascii"),
            "payloadType": kind,
            "signatures": [{"sig": base64.b64encode(signed).decode("ascii"), "keyid": ""}],
        },
    }
    try:
        signature.write_text(json.dumps(bundle), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {signature}: {error.strerror}") from error


def _digest(stream: Any, header: dict[str, Any], names: list[str], start: int) -> ModelDigest:  # noqa: ANN401
    tensors, parameters = {}, 0
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise ProvenanceError(f"the tensor {name[:80]!r} is of dtype {entry['dtype']}, which has no digest here")
        begin, end = entry["data_offsets"]
        digest = hashlib.sha256(f"{_DTYPES[entry['dtype']]}|{','.join(map(str, entry['shape']))}|".encode())
        stream.seek(start + begin)
        left = end - begin
        while left > 0:
            block = stream.read(min(left, _BLOCK))
            if not block:
                raise ProvenanceError(f"the file ends within the tensor {name[:80]!r}")
            digest.update(block)
            left -= len(block)
        tensors[name] = digest.digest()
        elements = 1
        for length in entry["shape"]:
            elements *= length
        parameters += elements
    return ModelDigest(root=tensors_root(tensors), tensors=tensors, parameters=parameters)


def _oms_statement(root: Path, ours: list[str]) -> dict[str, Any]:
    files = digest_files(root, without=ours)
    whole = hashlib.sha256(b"".join(bytes.fromhex(file.sha256) for file in files)).hexdigest()
    return {
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": root.name, "digest": {"sha256": whole}}],
        "predicateType": _OMS_TYPE,
        "predicate": {
            "serialization": {
                "method": "files",
                "hash_type": "sha256",
                "allow_symlinks": False,
                "ignore_paths": sorted([*ours, *_OMS_IGNORED]) if root.is_dir() else [],
            },
            "resources": [{"name": f.name, "algorithm": "sha256", "digest": f.sha256} for f in files],
        },
    }


def _key(pem: bytes) -> ec.EllipticCurvePrivateKey:
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise IdentityError("the key that should sign the model's files is damaged or encrypted") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name not in _HASHES:
        raise IdentityError("model signing takes an ECDSA key on P-256, P-384 or P-521")
    return key


_HASHES: Final[dict[str, hashes.HashAlgorithm]] = {
    "secp256r1": hashes.SHA256(),
    "secp384r1": hashes.SHA384(),
    "secp521r1": hashes.SHA512(),
}


def _hash_of(key: ec.EllipticCurvePrivateKey) -> hashes.HashAlgorithm:
    return _HASHES[key.curve.name]
