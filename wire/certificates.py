"""X.509 certificates (RFC 5280): making ours, and reading anyone's without being hurt by it.

Ours sign themselves and are no authorities: a peer that pins one trusts exactly this one, and its key cannot vouch for
another. TLS still needs a name to look for, so each carries :data:`NODE_NAME`, whatever its host is called.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.utils import CryptographyDeprecationWarning
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wire.errors import ConfigError, IdentityError
from wire.files import read_bounded

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = [
    "NODE_NAME",
    "CertificateFacts",
    "alternative_names",
    "facts_of",
    "fingerprint_of",
    "first_certificate",
    "new_certificate",
    "read_certificate_file",
    "read_certificates",
]

NODE_NAME: Final = "cloister-node"  # in every certificate of ours, so that a pin works whatever the host is called
MAX_BUNDLE_BYTES: Final = 2**20  # a thousand pinned certificates in one file, or all the CAs of an operating system
_CLOCK_SLACK: Final = dt.timedelta(hours=1)  # a peer's clock may run behind when the certificate is new
_USES: Final = (ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH)
_LABEL: Final = "[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(\.{_LABEL})*")  # RFC 1123, section 2.1


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a person or a check wants to know of a certificate."""

    fingerprint: str
    subject: str
    names: tuple[str, ...]
    valid_from: dt.datetime
    valid_until: dt.datetime
    is_authority: bool


def fingerprint_of(pem: bytes) -> str:
    """SHA-256 of the first certificate in ``pem``, over its DER form, as 64 lowercase hex digits.

    Raises:
        IdentityError: There is no certificate in it.
    """
    return read_certificates(pem, "the certificate")[0].fingerprint(hashes.SHA256()).hex()


def facts_of(pem: bytes, what: str = "the certificate") -> CertificateFacts:
    """What the first certificate in ``pem`` says of itself; ``what`` names it in errors.

    Raises:
        IdentityError: There is no certificate in it.
    """
    certificate = read_certificates(pem, what)[0]
    try:
        subject = certificate.subject.rfc4514_string()
        names, authority = _names(certificate), _is_authority(certificate)
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise IdentityError(f"{what} is damaged ({error}): get it again from its owner") from error
    return CertificateFacts(
        fingerprint=certificate.fingerprint(hashes.SHA256()).hex(),
        subject=subject,
        names=names,
        valid_from=certificate.not_valid_before_utc,
        valid_until=certificate.not_valid_after_utc,
        is_authority=authority,
    )


def first_certificate(pem: bytes) -> bytes:
    """The first certificate in ``pem`` alone; what follows a pinned one, a chain or worse, is not trusted.

    Raises:
        IdentityError: There is no certificate in it.
    """
    return read_certificates(pem, "the certificate")[0].public_bytes(Encoding.PEM)


def read_certificates(pem: bytes, what: str) -> list[x509.Certificate]:
    """The certificates in ``pem``, at least one; ``what`` names them in errors.

    Raises:
        IdentityError: There is none, one is damaged, or a private key lies with them.
    """
    if b"PRIVATE KEY-----" in pem:
        raise IdentityError(f"{what} contains a private key: never hand that out; pass on tls.crt alone")
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except (ValueError, CryptographyDeprecationWarning) as error:  # the latter where warnings are errors
        raise IdentityError(f"{what} is no certificate in PEM: expected -----BEGIN CERTIFICATE-----") from error
    if any(certificate.serial_number <= 0 for certificate in certificates):
        raise IdentityError(f"{what} has a serial number that is not positive (RFC 5280, 4.1.2.2): have it made anew")
    return certificates


def read_certificate_file(path: Path) -> bytes:
    """PEM of the certificates in a file, one or many, that someone else gave us.

    Raises:
        IdentityError: It cannot be read, is too large, or holds no certificates (or a private key).
    """
    content = read_bounded(path, limit=MAX_BUNDLE_BYTES, remedy="check the path")
    read_certificates(content, str(path))
    return content


def new_certificate(common_name: str, names: Sequence[x509.GeneralName], *, days: int) -> tuple[bytes, bytes]:
    """A certificate that signs itself, and its key, both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCK_SLACK)
        .not_valid_after(now + dt.timedelta(days=days))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        # No authority, and no right to sign certificates: a pinned peer cannot vouch for a stranger.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_digital_signature_only(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USES), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


def _digital_signature_only() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )


def alternative_names(names: Sequence[str]) -> list[x509.GeneralName]:
    """``names`` (DNS names and IP addresses) behind the three that each certificate of ours carries.

    Raises:
        ConfigError: One is neither.
    """
    ours: list[x509.GeneralName] = [
        x509.DNSName(NODE_NAME),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
    ]
    return list(dict.fromkeys(ours + [_alternative_name(name) for name in names]))


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        if _DNS_NAME.fullmatch(name):
            return x509.DNSName(name)
    raise ConfigError(f"{name!r} is neither a DNS name nor an IP address; write the host alone, without a port")


def _names(certificate: x509.Certificate) -> tuple[str, ...]:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    return tuple(str(name.value) for name in found if isinstance(name, x509.DNSName | x509.IPAddress))


def _is_authority(certificate: x509.Certificate) -> bool:
    """Whether this certificate might vouch for others; one that does not say so may, as verifiers read it."""
    try:
        return certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return True
