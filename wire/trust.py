"""Whom a node lets in: pinned owners, and whomever a CA vouches for.

TLS is told about exactly these certificates as roots. A pinned certificate must say that it is no authority (RFC 5280,
BasicConstraints), or it is not taken: otherwise its key could issue certificates for strangers, and TLS would accept
them. What TLS decided when a connection began is checked again for each call, because a connection may outlive the
trust in it.
"""

from __future__ import annotations

import datetime as dt
import functools
import logging
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from wire.certificates import facts_of, read_certificate_file, read_certificates
from wire.errors import IdentityError, NotAuthorizedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    import grpc

__all__ = ["CERTIFICATE_SUFFIXES", "Trust", "check_pinnable", "peer_fingerprint"]

CERTIFICATE_SUFFIXES: Final = frozenset({".pem", ".crt", ".cer"})
MAX_TRUST_FILES: Final = 10_000  # listed in some 20 ms at each handshake; a larger crowd belongs under a CA

_log = logging.getLogger(__name__)

_Stamp = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _Trusted:
    """What the files said when they were last read."""

    stamps: tuple[_Stamp, ...]
    pins: frozenset[str]
    authorities: tuple[x509.Certificate, ...]
    roots: bytes


class Trust:
    """Who may talk to this node. Without owners and without a CA: nobody.

    The files are looked at on every handshake and every call, and read again when they have changed: an owner is added
    by a new file and removed by deleting it. A file that cannot be used lets nobody in, and the log says so.
    """

    def __init__(self, owners: Path | None = None, *, ca: Path | None = None) -> None:
        """Reads the files.

        Args:
            owners: A folder with certificates (``*.pem``, ``*.crt``, ``*.cer``), or one file of them. May come later.
            ca: A file with the certificates of the authorities that issue owners' certificates directly.
        """
        self._owners, self._ca = owners, ca
        self._lock = threading.Lock()
        self._once_pinned: set[str] = set()
        self._trusted: _Trusted | None = None
        self._current()

    def roots(self) -> bytes:
        """PEM of the certificates that TLS starts from; never empty, since TLS might take no roots for any."""
        return self._current().roots

    def fingerprints(self) -> frozenset[str]:
        """The pinned owners."""
        return self._current().pins

    def allows(self, fingerprint: str) -> bool:
        """Whether a peer that TLS has let in is still welcome, by its fingerprint alone.

        With a CA, that is everyone but those who were pinned and are no more. Where the call's context is at hand,
        :meth:`authorize` is stricter: it checks the CA's signature and the dates again.
        """
        now = self._current()
        return fingerprint in now.pins or (bool(now.authorities) and fingerprint not in self._once_pinned)

    def authorize(self, context: grpc.ServicerContext) -> str:
        """The caller's fingerprint, once it is certain that its certificate is pinned or issued by the CA, and in date.

        Raises:
            NotAuthorizedError: It is not, or no more.
        """
        certificate = _peer_certificate(context)
        fingerprint = certificate.fingerprint(hashes.SHA256()).hex()
        now = self._current()
        if dt.datetime.now(dt.UTC) > certificate.not_valid_after_utc:
            raise NotAuthorizedError("your certificate has expired: make a new one with `cloister keys init`")
        if fingerprint not in now.pins and not _issued_by_any(certificate, now.authorities):
            raise NotAuthorizedError(f"this node does not trust the certificate sha256:{fingerprint}: ask its operator")
        return fingerprint

    def _current(self) -> _Trusted:
        with self._lock:
            files = _pin_files(self._owners)
            # Taken before reading: what changes while we read is noticed the next time.
            stamps = tuple(_stamp(file) for file in (*files, *filter(None, (self._ca,))))
            if self._trusted is None or self._trusted.stamps != stamps:
                self._trusted = _read(stamps, files, self._ca)
                self._once_pinned |= self._trusted.pins
            return self._trusted


def peer_fingerprint(context: grpc.ServicerContext) -> str:
    """SHA-256 of the certificate whose key the caller has proven to hold, as 64 lowercase hex digits.

    Raises:
        NotAuthorizedError: The connection has no client certificate.
    """
    return _peer_certificate(context).fingerprint(hashes.SHA256()).hex()


def check_pinnable(pem: bytes, what: str) -> None:
    """Refuses certificates that might vouch for others; ``what`` names them in errors.

    Raises:
        IdentityError: One of them is an authority, or does not say that it is none, or is none of ours at all.
    """
    for certificate in read_certificates(pem, what):
        _check_pin(certificate, what)


def _check_pin(certificate: x509.Certificate, what: str) -> None:
    if facts_of(certificate.public_bytes(Encoding.PEM), what).is_authority:
        raise IdentityError(f"{what} is the certificate of an authority, which cannot be pinned: give it as a CA file")


def _check_authority(certificate: x509.Certificate, what: str) -> None:
    if not facts_of(certificate.public_bytes(Encoding.PEM), what).is_authority:
        raise IdentityError(f"{what} holds a certificate that is no authority: pin it instead")


def _peer_certificate(context: grpc.ServicerContext) -> x509.Certificate:
    # The stubs say bytes; gRPC gives a list of them, the leaf alone.
    for pem in cast("Iterable[bytes]", context.auth_context().get("x509_pem_cert", ())):
        return read_certificates(pem, "the caller's certificate")[0]
    raise NotAuthorizedError("this connection shows no client certificate: make one with `cloister keys init`")


def _pin_files(owners: Path | None) -> list[Path]:
    if owners is None:
        return []
    try:
        if not owners.is_dir():
            return [owners]
        found = sorted(path for path in owners.iterdir() if _is_certificate_file(path))
    except OSError as error:
        _log.error("cannot list %s (%s): nobody in it is let in", owners, error.strerror)
        return []
    if len(found) > MAX_TRUST_FILES:
        _log.error("%s holds more than %d files; the rest is not read: use a CA", owners, MAX_TRUST_FILES)
    return found[:MAX_TRUST_FILES]


def _is_certificate_file(path: Path) -> bool:
    return path.suffix.lower() in CERTIFICATE_SUFFIXES and not path.name.startswith(".")


def _stamp(file: Path) -> _Stamp:
    try:
        seen = file.stat()
    except OSError as error:
        return (str(file), error.errno)
    return (str(file), seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)


def _read(stamps: tuple[_Stamp, ...], files: Sequence[Path], ca: Path | None) -> _Trusted:
    pinned = [certificate for file in files for certificate in _usable(file, _check_pin)]
    authorities = _usable(ca, _check_authority) if ca is not None else []
    pins = frozenset(certificate.fingerprint(hashes.SHA256()).hex() for certificate in pinned)
    roots = b"".join(certificate.public_bytes(Encoding.PEM) for certificate in (*pinned, *authorities))
    _log.info("trust: %d pinned owners, %d authorities", len(pins), len(authorities))
    return _Trusted(stamps, pins, tuple(authorities), roots or _nobody())


def _usable(file: Path, check: Callable[[x509.Certificate, str], None]) -> list[x509.Certificate]:
    """All certificates of a file, or none: a file that is half understood is not believed."""
    if not file.exists():
        return []
    try:
        certificates = read_certificates(read_certificate_file(file), str(file))
        for certificate in certificates:
            check(certificate, str(file))
    except IdentityError as error:
        _log.error("nobody is let in by %s: %s", file, error)
        return []
    return certificates


def _issued_by_any(certificate: x509.Certificate, authorities: Iterable[x509.Certificate]) -> bool:
    return any(_issued_by(certificate, authority) for authority in authorities)


def _issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


@functools.cache
def _nobody() -> bytes:
    """A root whose key was thrown away: TLS has something to check against, and nobody can match it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "cloister trusts nobody")])
    now = dt.datetime.now(dt.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now)
    builder = builder.not_valid_after(now + dt.timedelta(days=36500))
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    return builder.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
