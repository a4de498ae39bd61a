"""Who a party is: an Ethereum key that signs, and a certificate with its key that opens TLS channels.

An identity is a folder of four files, all readable by their owner alone:

- ``keystore.json``: the signing key, encrypted by a passphrase (Web3 Secret Storage, version 3, scrypt);
- ``tls.crt`` and ``tls.key``: an X.509 certificate (RFC 5280, ECDSA P-256) and its key, not encrypted, because a
  node must come back after a restart without a person;
- ``identity.json``: the role and the address.

``load_identity`` asks for no passphrase; only ``load_signer`` does.
"""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from wire.certificates import (
    NODE_NAME,
    CertificateFacts,
    alternative_names,
    facts_of,
    fingerprint_of,
    new_certificate,
    read_certificates,
)
from wire.errors import ConfigError, IdentityError
from wire.files import publish_folder, read_bounded

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from eth_account import Account
    from eth_account.signers.local import LocalAccount  # takes more than a second to import, and only signing needs it

__all__ = [
    "CERTIFICATE_FILE",
    "KEYSTORE_FILE",
    "KEY_FILE",
    "NODE_NAME",
    "CertificateFacts",
    "Identity",
    "Role",
    "as_owner",
    "create_identity",
    "facts_of",
    "fingerprint_of",
    "load_identity",
    "load_signer",
]

Role = Literal["owner", "node"]

CERTIFICATE_FILE: Final = "tls.crt"
KEY_FILE: Final = "tls.key"
KEYSTORE_FILE: Final = "keystore.json"
_FACTS_FILE: Final = "identity.json"

MAX_SCRYPT_BYTES: Final = 2**30  # four times what eth-account's own parameters take
KDF_COST: Final = 2**18  # as go-ethereum's standard: about a second
MAX_DAYS: Final = 3650  # a pin that nobody renews within ten years is forgotten, not trusted

_ADDRESS: Final = re.compile(r"0x[0-9a-fA-F]{40}")


@dataclass(frozen=True, slots=True)
class Identity:
    """A party's identity as TLS needs it; the signing key stays encrypted on disk (see :func:`load_signer`).

    Attributes:
        role: What the identity was made for.
        address: The Ethereum address of the signing key, with its EIP-55 checksum.
        certificate_pem: The certificate, followed by intermediate ones where a CA issued it.
        private_key_pem: The certificate's key; it opens TLS channels in this party's name.
        fingerprint: SHA-256 of the certificate in DER, 64 lowercase hex digits: what peers pin.
        folder: Where the files are.
    """

    role: Role
    address: str
    certificate_pem: bytes = field(repr=False)  # not secret, but fifteen lines long
    private_key_pem: bytes = field(repr=False)
    fingerprint: str
    folder: Path


def create_identity(
    folder: Path, *, role: Role, passphrase: str, names: Sequence[str] = (), days: int = 825, kdf_cost: int = KDF_COST
) -> Identity:
    """Makes a new identity in ``folder``; it appears there whole or not at all.

    Args:
        folder: A folder that does not exist yet, or is empty.
        role: ``owner`` or ``node``.
        passphrase: Encrypts the signing key. The TLS key is not encrypted.
        names: DNS names and IP addresses at which peers reach a node; pinned peers need none.
        days: How long the certificate is valid.
        kdf_cost: scrypt's N, a power of two: what guessing a person's passphrase costs. 128 random bits need none.

    Raises:
        ConfigError: An argument is wrong.
        IdentityError: The folder holds something, or cannot be written.
    """
    folder = Path(os.path.abspath(folder))  # noqa: PTH100 - Path.resolve() would follow a link to someone else's folder
    _check_arguments(role, passphrase, days)
    alternatives = alternative_names(names)
    _refuse_to_overwrite(folder)
    address, keystore = _new_keystore(passphrase, kdf_cost)
    certificate_pem, private_key_pem = new_certificate(f"cloister {role} {address}", alternatives, days=days)
    facts = {"version": 1, "role": role, "address": address}
    files = {
        KEYSTORE_FILE: keystore,
        CERTIFICATE_FILE: certificate_pem,
        KEY_FILE: private_key_pem,
        _FACTS_FILE: json.dumps(facts).encode() + b"\n",
    }
    try:
        publish_folder(folder, files)
    except FileExistsError as error:
        raise _occupied(folder) from error
    return load_identity(folder)


def load_identity(folder: Path, *, check_dates: bool = True) -> Identity:
    """Reads the identity in ``folder``; needs no passphrase.

    Args:
        folder: As :func:`create_identity` left it. ``tls.crt`` and ``tls.key`` may have been replaced by your CA's.
        check_dates: Also refuse a certificate that has expired or is not valid yet.

    Raises:
        IdentityError: A file is missing, damaged, readable by others, out of date, or belongs to another key.
    """
    if not (folder / CERTIFICATE_FILE).exists():
        raise IdentityError(f"no identity in {folder}: make one with `cloister keys init --role owner --out {folder}`")
    role, address = _read_facts(folder)
    certificate_pem = read_bounded(folder / CERTIFICATE_FILE)
    certificate = read_certificates(certificate_pem, str(folder / CERTIFICATE_FILE))[0]
    private_key_pem = read_bounded(folder / KEY_FILE, private=True)
    if _public_bytes(_parse_key(private_key_pem, folder / KEY_FILE)) != _public_bytes(certificate):
        raise IdentityError(f"{KEY_FILE} and {CERTIFICATE_FILE} in {folder} do not belong together: restore both")
    if check_dates:
        _check_dates(certificate, folder)
    return Identity(role, address, certificate_pem, private_key_pem, fingerprint_of(certificate_pem), folder)


def as_owner(identity: Identity) -> Identity:
    """The same identity, for dialling out.

    Raises:
        IdentityError: It is a node's: whoever dials with it is not let in, and would not learn why.
    """
    if identity.role != "owner":
        raise IdentityError(
            f"the identity in {identity.folder} is a node's, and only owners dial out: make your own with `cloister "
            "keys init --role owner --out DIR`, have the node trust its tls.crt, and name that folder as your identity"
        )
    return identity


def load_signer(folder: Path, passphrase: str) -> LocalAccount:
    """Decrypts the signing key; takes a second or two, on purpose (scrypt).

    Raises:
        IdentityError: The keystore is missing, damaged or readable by others, or the passphrase is wrong.
    """
    accounts = _accounts()
    path = folder / KEYSTORE_FILE
    keystore = _read_keystore(path)
    _check_scrypt(keystore, path)
    try:
        account = accounts.from_key(accounts.decrypt(cast("Any", keystore), passphrase))
    except (ValueError, KeyError, TypeError, NotImplementedError):
        # The cause is left out of the chain: its frames hold the key.
        raise IdentityError(f"{path} does not open: the passphrase is wrong, or the file is damaged") from None
    if account.address.lower() != _read_facts(folder)[1].lower():
        raise IdentityError(f"{path} holds the key of another address than {_FACTS_FILE} says: restore both files")
    return cast("LocalAccount", account)


def _accounts() -> type[Account]:
    """The library of keystores, with the depth of Python's stack as it was: it asks for one that C's stack has not."""
    depth = sys.getrecursionlimit()
    from eth_account import Account  # noqa: PLC0415 - takes more than a second to import

    sys.setrecursionlimit(depth)  # with 100,000, which py_ecc sets, deeply nested JSON ends the process
    return Account


def _check_arguments(role: str, passphrase: str, days: int) -> None:
    if role not in ("owner", "node"):
        raise ConfigError(f"role {role!r}: an identity is an owner or a node")
    if not passphrase:
        raise ConfigError("the passphrase is empty: it protects the signing key, so choose one")
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(f"{days} days: a certificate lives between 1 and {MAX_DAYS} days")


def _refuse_to_overwrite(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _occupied(folder)


def _occupied(folder: Path) -> IdentityError:
    return IdentityError(
        f"{folder} exists and is not empty; an identity is never overwritten, because its key cannot be made again: "
        "choose another folder, or move this one away"
    )


def _new_keystore(passphrase: str, kdf_cost: int) -> tuple[str, bytes]:
    accounts = _accounts()
    account = accounts.create()
    keystore = accounts.encrypt(account.key, passphrase, kdf="scrypt", iterations=kdf_cost)
    return account.address, json.dumps(keystore).encode() + b"\n"


def _parse_object(content: bytes, path: Path) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise IdentityError(f"{path} is damaged: restore it from your backup")
    return value


def _read_facts(folder: Path) -> tuple[Role, str]:
    path = folder / _FACTS_FILE
    facts = _parse_object(read_bounded(path), path)
    role, address = facts.get("role"), facts.get("address")
    whole = facts.get("version") == 1 and isinstance(address, str) and _ADDRESS.fullmatch(address)
    if not whole or role not in ("owner", "node"):
        raise IdentityError(f"{path} is damaged, or from a newer version: restore it from your backup")
    holder = str(_read_keystore(folder / KEYSTORE_FILE).get("address", "")).lower().removeprefix("0x")
    if holder != cast("str", address).lower().removeprefix("0x"):
        raise IdentityError(f"{KEYSTORE_FILE} and {_FACTS_FILE} in {folder} name different addresses: restore both")
    return cast("Role", role), cast("str", address)


def _read_keystore(path: Path) -> dict[str, Any]:
    keystore = _parse_object(read_bounded(path, private=True), path)
    if keystore.get("version") != 3:  # noqa: PLR2004 - the one version there is
        raise IdentityError(f"{path} is no keystore of version 3: restore it from your backup")
    return keystore


def _check_scrypt(keystore: Mapping[str, Any], path: Path) -> None:
    """Refuses parameters that would fill the memory before the passphrase is even looked at."""
    crypto = keystore.get("crypto")
    params = crypto.get("kdfparams") if isinstance(crypto, dict) and crypto.get("kdf") == "scrypt" else None
    sizes = [params.get(name) for name in ("n", "r", "p")] if isinstance(params, dict) else []
    product = 128
    for size in sizes:
        product *= size if isinstance(size, int) and size > 0 else MAX_SCRYPT_BYTES + 1
    if not sizes or product > MAX_SCRYPT_BYTES:
        raise IdentityError(f"{path} names no scrypt parameters that open within 1 GiB: restore it from your backup")


def _parse_key(pem: bytes, path: Path) -> Any:  # noqa: ANN401 - a union of all key types of the library
    try:
        return load_pem_private_key(pem, password=None).public_key()
    except TypeError:
        raise IdentityError(
            f"{path} is encrypted; TLS needs it in the clear: decrypt it with `openssl pkey`, and chmod 600"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise IdentityError(f"{path} is damaged: restore it from your backup, or make a new identity") from None


def _public_bytes(holder: Any) -> bytes:  # noqa: ANN401 - a public key of any type, or a certificate
    try:
        key = holder.public_key() if isinstance(holder, x509.Certificate) else holder
        return cast("bytes", key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise IdentityError(f"the certificate's key is of a kind that TLS here cannot use ({error})") from error


def _check_dates(certificate: x509.Certificate, folder: Path) -> None:
    now = dt.datetime.now(dt.UTC)
    if now > certificate.not_valid_after_utc:
        raise IdentityError(
            f"the certificate in {folder} expired on {certificate.not_valid_after_utc:%Y-%m-%d}: "
            "make a new identity with `cloister keys init` and give its certificate to your peers"
        )
    if now < certificate.not_valid_before_utc:
        raise IdentityError(
            f"the certificate in {folder} is valid only from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC: "
            "check this machine's clock"
        )
