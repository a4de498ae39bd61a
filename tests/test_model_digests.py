"""Model digests: over tensors whatever holds them, and as OpenSSF Model Signing reads files (THREATS T22)."""

from __future__ import annotations

import base64
import hashlib
import json
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from safetensors.torch import save, save_file

from provenance.models import digest_files, digest_model, sign_files, tensors_root
from wire.errors import IdentityError, ProvenanceError
from wire.state import tensor_digest

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.ones(3, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "scalar": torch.tensor(7),
    "flag": torch.tensor([True, False]),
}


def test_the_root_is_over_tensors_not_over_a_file(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "one.safetensors")
    save_file(dict(reversed(TENSORS.items())), tmp_path / "two.safetensors", metadata={"saved": "later"})
    one, two = digest_model(tmp_path / "one.safetensors"), digest_model(tmp_path / "two.safetensors")

    assert one == two
    assert one.parameters == 6 + 3 + 0 + 1 + 2
    assert one.tensors == {name: tensor_digest(tensor) for name, tensor in TENSORS.items()}
    assert one.root == tensors_root(one.tensors)


def test_T22_any_other_tensor_name_shape_or_dtype_is_another_root(tmp_path: Path) -> None:
    seen = set()
    for number, change in enumerate(
        (
            {},
            {"a": torch.ones(3, dtype=torch.bfloat16) * 2},
            {"a": torch.ones(3, dtype=torch.float16)},
            {"b.weight": TENSORS["b.weight"].reshape(3, 2)},
            {"empty": torch.zeros(4, 0)},
            {"more": torch.zeros(1)},
        )
    ):
        save_file(TENSORS | change, tmp_path / f"{number}.safetensors")
        seen.add(digest_model(tmp_path / f"{number}.safetensors").root)
    save_file({name + "x": tensor for name, tensor in TENSORS.items()}, tmp_path / "names.safetensors")
    seen.add(digest_model(tmp_path / "names.safetensors").root)

    assert len(seen) == 7


def test_T22_every_flipped_byte_of_a_model_file_shows(tmp_path: Path) -> None:
    whole = save({"w": torch.arange(4, dtype=torch.int16), "v": torch.ones(2)})
    (tmp_path / "model").write_bytes(whole)
    right = digest_model(tmp_path / "model")
    (files,) = digest_files(tmp_path / "model")
    for position in range(len(whole)):
        bad = bytearray(whole)
        bad[position] ^= 0x10
        (tmp_path / "model").write_bytes(bad)
        assert digest_files(tmp_path / "model") != [files]
        try:
            assert digest_model(tmp_path / "model") != right
        except ProvenanceError:
            continue


@pytest.mark.parametrize(
    "hostile",
    [
        b"",
        b"\xff" * 8,
        (2**40).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (100_000).to_bytes(8, "little") + b"[" * 100_000,
        b'\x3f\0\0\0\0\0\0\0{"w":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}',
    ],
    ids=range(6),
)
def test_T02_a_hostile_model_file_gets_the_documented_error(tmp_path: Path, hostile: bytes) -> None:
    (tmp_path / "model").write_bytes(hostile)

    with pytest.raises(ProvenanceError):
        digest_model(tmp_path / "model")


def test_files_are_listed_as_oms_lists_them(tmp_path: Path) -> None:
    for name in ("b.txt", "a/c.txt", ".gitignore", ".git/config", "model.sig"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)

    found = digest_files(tmp_path, without=["model.sig"])

    assert [file.name for file in found] == ["a/c.txt", "b.txt"]
    assert found[0].sha256 == hashlib.sha256(b"a/c.txt").hexdigest()
    (tmp_path / "link").symlink_to("b.txt")
    with pytest.raises(ProvenanceError, match="is a link"):
        digest_files(tmp_path)


def test_the_signature_of_a_models_files_is_an_oms_bundle(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "w.bin").write_bytes(b"weights")
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    sign_files(tmp_path / "m", pem, tmp_path / "m" / "model.sig")

    bundle = json.loads((tmp_path / "m" / "model.sig").read_text())["dsseEnvelope"]
    body, kind = base64.b64decode(bundle["payload"]), bundle["payloadType"].encode()
    pae = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(body), body)
    key.public_key().verify(base64.b64decode(bundle["signatures"][0]["sig"]), pae, ec.ECDSA(hashes.SHA256()))
    statement = json.loads(body)
    digest = hashlib.sha256(b"weights").hexdigest()
    assert statement["predicate"]["resources"] == [{"name": "w.bin", "algorithm": "sha256", "digest": digest}]
    assert statement["subject"][0]["digest"]["sha256"] == hashlib.sha256(bytes.fromhex(digest)).hexdigest()


def test_keys_that_oms_does_not_take_are_refused(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    other = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    for pem in (other, b"nothing"):
        with pytest.raises(IdentityError):
            sign_files(tmp_path / "w", pem, tmp_path / "sig")
