"""Identities on disk: made whole or not at all, private, and refused when anything about them is wrong."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)
from eth_account import Account
from eth_account.messages import encode_defunct
from eth_utils.address import is_checksum_address
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wire import identity as module
from wire.certificates import alternative_names, facts_of, fingerprint_of, new_certificate
from wire.errors import ConfigError, IdentityError
from wire.identity import Identity, create_identity, load_identity, load_signer

ROOT: Final = Path(__file__).parents[1]
PASSPHRASE = "correct horse battery staple"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Identity:
    """One identity for all tests: its keystore takes seconds. Whoever changes a file takes a copy."""
    folder = tmp_path_factory.mktemp("identities") / "node"
    return create_identity(folder, role="node", passphrase=PASSPHRASE, names=["gpu1.example.org", "10.1.2.3", "::1"])


@pytest.fixture
def copy(made: Identity, tmp_path: Path) -> Path:
    return shutil.copytree(made.folder, tmp_path / "copy")


def test_an_identity_loads_as_it_was_made(made: Identity) -> None:
    assert load_identity(made.folder) == made
    assert (made.role, is_checksum_address(made.address)) == ("node", True)
    assert re.fullmatch(r"[0-9a-f]{64}", made.fingerprint)
    assert fingerprint_of(made.certificate_pem) == made.fingerprint


def test_T23_all_its_files_are_private(made: Identity) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in made.folder.iterdir()}

    assert modes == dict.fromkeys(("keystore.json", "tls.crt", "tls.key", "identity.json"), 0o600)
    assert stat.S_IMODE(made.folder.stat().st_mode) == 0o700


def test_T23_no_secret_is_in_what_is_printed_of_it(made: Identity) -> None:
    secret = made.private_key_pem.decode().splitlines()[1]

    assert secret not in repr(made)
    assert secret not in str(made)


def test_T23_the_keystore_is_encrypted_by_scrypt_at_its_full_cost(made: Identity) -> None:
    keystore = json.loads((made.folder / "keystore.json").read_bytes())
    params = keystore["crypto"]["kdfparams"]

    assert (keystore["version"], keystore["crypto"]["kdf"]) == (3, "scrypt")
    assert params["n"] * params["r"] * params["p"] >= 2**20


def test_the_signer_signs_in_the_identitys_name(made: Identity) -> None:
    signer = load_signer(made.folder, PASSPHRASE)
    message = encode_defunct(text="a receipt")

    assert Account.recover_message(message, signature=signer.sign_message(message).signature) == made.address


def test_T23_a_wrong_passphrase_is_refused_and_not_repeated(made: Identity) -> None:
    with pytest.raises(IdentityError, match="does not open: the passphrase is wrong") as refused:
        load_signer(made.folder, "Tr0ub4dor&3")

    assert "Tr0ub4dor&3" not in str(refused.value)
    assert refused.value.__cause__ is None
    assert refused.value.__suppress_context__


def test_the_certificate_says_what_it_may_do_and_nothing_more(made: Identity) -> None:
    certificate = x509.load_pem_x509_certificate(made.certificate_pem)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    facts = facts_of(made.certificate_pem)

    assert not facts.is_authority
    assert (usage.digital_signature, usage.key_cert_sign, usage.crl_sign) == (True, False, False)
    assert facts.names == ("cloister-node", "localhost", "127.0.0.1", "gpu1.example.org", "10.1.2.3", "::1")
    assert facts.valid_until - dt.datetime.now(dt.UTC) < dt.timedelta(days=825)
    assert isinstance(certificate.public_key(), ec.EllipticCurvePublicKey)


def test_an_identity_is_never_overwritten(copy: Path) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}

    with pytest.raises(IdentityError, match=r"never overwritten.*choose another folder"):
        create_identity(copy, role="node", passphrase=PASSPHRASE)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_an_identity_that_appears_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Identity
) -> None:
    target = tmp_path / "raced"

    def slow_keystore(passphrase: str, _: int) -> tuple[str, bytes]:
        shutil.copytree(made.folder, target)  # the other process wins while we are busy with scrypt
        return made.address, passphrase.encode()

    monkeypatch.setattr(module, "_new_keystore", slow_keystore)

    with pytest.raises(IdentityError, match="never overwritten"):
        create_identity(target, role="node", passphrase=PASSPHRASE)
    assert load_identity(target).fingerprint == made.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["raced"]


def test_T07_a_disk_that_fills_up_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Identity
) -> None:
    keystore = (made.folder / "keystore.json").read_bytes()
    monkeypatch.setattr(module, "_new_keystore", lambda *_: (made.address, keystore))
    calls: list[int] = []
    fsync = os.fsync

    def full_at_third(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_at_third)

    with pytest.raises(IdentityError, match="No space left on device; choose a folder"):
        create_identity(tmp_path / "new", role="owner", passphrase=PASSPHRASE)
    assert list(tmp_path.iterdir()) == []


def test_where_a_file_stands_no_identity_is_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")

    with pytest.raises(IdentityError, match="choose another folder"):
        create_identity(tmp_path / "file", role="owner", passphrase=PASSPHRASE)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"passphrase": ""}, "the passphrase is empty"),
        ({"role": "auditor"}, "'auditor': an identity is an owner or a node"),
        ({"days": 0}, "0 days: a certificate lives between 1 and 3650"),
        ({"days": 3651}, "3651 days"),
        ({"names": ["gpu1:7443"]}, "'gpu1:7443' is neither a DNS name nor an IP address; write the host alone"),
        ({"names": ["a..b"]}, "is neither a DNS name"),
        ({"names": ["x" * 64]}, "is neither a DNS name"),
        ({"names": ["gpu\n"]}, "is neither a DNS name"),
        ({"names": ["*.example.org"]}, "is neither a DNS name"),
    ],
)
def test_wrong_arguments_make_nothing(tmp_path: Path, changes: dict[str, object], complaint: str) -> None:
    arguments: dict[str, object] = {"role": "node", "passphrase": PASSPHRASE} | changes

    with pytest.raises(ConfigError, match=re.escape(complaint)):
        create_identity(tmp_path / "new", **arguments)  # type: ignore[arg-type]  # wrong on purpose
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["tls.key", "keystore.json"])
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_T23_a_key_that_others_can_read_is_refused(copy: Path, name: str, mode: int) -> None:
    (copy / name).chmod(mode)

    with pytest.raises(IdentityError, match=re.escape(f"run `chmod 600 {copy / name}`")):
        load_identity(copy)


@pytest.mark.parametrize("name", ["identity.json", "keystore.json", "tls.crt", "tls.key"])
def test_a_missing_file_is_named(copy: Path, name: str) -> None:
    (copy / name).unlink()

    with pytest.raises(IdentityError, match="no identity in" if name == "tls.crt" else re.escape(name)):
        load_identity(copy)


def test_where_there_is_no_identity_the_error_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match="make one with `cloister keys init"):
        load_identity(tmp_path / "absent")


def test_an_expired_certificate_is_refused_but_can_be_shown(copy: Path) -> None:
    replace_certificate(copy, days=-0.02)

    with pytest.raises(IdentityError, match=r"expired on \d{4}-\d\d-\d\d: make a new identity"):
        load_identity(copy)
    assert load_identity(copy, check_dates=False).role == "node"


def test_a_certificate_from_the_future_points_at_the_clock(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wire.certificates._CLOCK_SLACK", dt.timedelta(hours=-1))
    replace_certificate(copy, days=1)

    with pytest.raises(IdentityError, match=r"valid only from .*check this machine's clock"):
        load_identity(copy)


def test_a_key_of_another_certificate_is_refused(copy: Path) -> None:
    (copy / "tls.crt").write_bytes(new_certificate("other", alternative_names([]), days=1)[0])

    with pytest.raises(IdentityError, match="do not belong together"):
        load_identity(copy)


def test_an_encrypted_tls_key_is_refused_with_the_reason(copy: Path) -> None:
    key = load_pem_private_key((copy / "tls.key").read_bytes(), None)
    encrypted = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (copy / "tls.key").write_bytes(encrypted)

    with pytest.raises(IdentityError, match="is encrypted; TLS needs it in the clear"):
        load_identity(copy)


def test_a_certificate_issued_by_a_ca_with_its_chain_is_taken(copy: Path) -> None:
    other = new_certificate("intermediate", alternative_names([]), days=1)[0]
    before = load_identity(copy)
    (copy / "tls.crt").write_bytes(before.certificate_pem + other)

    assert load_identity(copy).fingerprint == before.fingerprint


def test_a_private_key_is_never_taken_for_a_certificate(made: Identity) -> None:
    with pytest.raises(IdentityError, match="contains a private key: never hand that out") as refused:
        fingerprint_of(made.private_key_pem + made.certificate_pem)

    assert made.private_key_pem.decode().splitlines()[1] not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("identity.json", b""),
        ("identity.json", b"[]"),
        ("identity.json", b'{"version": 2, "role": "node", "address": "0x' + b"0" * 40 + b'"}'),
        ("identity.json", b'{"version": 1, "role": "auditor", "address": "0x' + b"0" * 40 + b'"}'),
        ("identity.json", b'{"version": 1, "role": [], "address": {}}'),
        ("identity.json", b"[" * 50_000),
        ("identity.json", b"\xff\xfe"),
        ("keystore.json", b"{}"),
        ("keystore.json", b'{"version": 3}'),
        ("tls.crt", b""),
        ("tls.crt", b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        ("tls.crt", b"x" * 70_000),
        ("tls.key", b""),
        ("tls.key", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"),
    ],
)
def test_a_damaged_file_is_named(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)

    with pytest.raises(IdentityError, match=re.escape(name)):
        load_identity(copy)


def test_a_keystore_of_another_address_is_refused(copy: Path) -> None:
    facts = json.loads((copy / "identity.json").read_bytes())
    (copy / "identity.json").write_text(json.dumps(facts | {"address": "0x" + "1" * 40}))

    with pytest.raises(IdentityError, match="name different addresses"):
        load_identity(copy)


@pytest.mark.parametrize("changes", [{"n": 2**40}, {"r": 2**30}, {"p": -1}, {"n": "1"}, {"n": None}, {"n": 2.0}])
def test_T02_a_keystore_that_would_fill_the_memory_is_refused_unopened(copy: Path, changes: dict[str, object]) -> None:
    keystore = json.loads((copy / "keystore.json").read_bytes())
    keystore["crypto"]["kdfparams"] |= changes
    (copy / "keystore.json").write_text(json.dumps(keystore))

    with pytest.raises(IdentityError, match="names no scrypt parameters that open within 1 GiB"):
        load_signer(copy, PASSPHRASE)


DEEP_JSON: Final = """
from pathlib import Path
from wire.errors import IdentityError
from wire.identity import _new_keystore, _parse_object

_new_keystore("of nobody", 2)
try:
    _parse_object(b"[" * 100_000, Path("keystore.json"))
except IdentityError as error:
    print(error)
"""


def test_T02_deeply_nested_json_is_an_error_also_after_keys_were_used() -> None:
    ran = subprocess.run([sys.executable, "-c", DEEP_JSON], cwd=ROOT, check=False, capture_output=True, text=True)

    assert (ran.returncode, ran.stdout) == (0, "keystore.json is damaged: restore it from your backup\n"), ran.stderr


@pytest.mark.parametrize("lost", ["crypto", "ciphertext", "mac", "cipherparams", "kdf"])
def test_a_keystore_that_lost_a_part_is_refused(copy: Path, lost: str) -> None:
    keystore = json.loads((copy / "keystore.json").read_bytes())
    (keystore if lost == "crypto" else keystore["crypto"]).pop(lost)
    keystore.get("crypto", {}).get("kdfparams", {}).update({"n": 2, "r": 1})  # quick to get past, and wrong
    (copy / "keystore.json").write_text(json.dumps(keystore))

    with pytest.raises(IdentityError, match=re.escape("keystore.json")):
        load_signer(copy, PASSPHRASE)


def test_an_identity_cannot_be_changed_in_memory(made: Identity) -> None:
    with pytest.raises(FrozenInstanceError):
        made.role = "owner"  # type: ignore[misc]  # the point of the test


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2000), value=st.integers(0, 255))
def test_one_byte_changed_in_a_certificate_is_an_error_of_ours_or_another_fingerprint(
    made: Identity, position: int, value: int
) -> None:
    pem = bytearray(made.certificate_pem)
    position %= len(pem)
    pem[position] = value

    try:
        same = facts_of(bytes(pem)).fingerprint == made.fingerprint
    except IdentityError:
        return
    assert (
        same == (pem == made.certificate_pem) or chr(value).isspace() or chr(made.certificate_pem[position]).isspace()
    )


def replace_certificate(folder: Path, *, days: float) -> None:
    pem, key = new_certificate("replaced", alternative_names([]), days=days)  # type: ignore[arg-type]  # part of a day
    (folder / "tls.crt").write_bytes(pem)
    (folder / "tls.key").write_bytes(key)
