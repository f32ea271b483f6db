"""Certificates as an authority would issue them, good and bad, for tests of signing."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID, ObjectIdentifier

EMAIL = "1.3.6.1.5.5.7.3.4"
DOCUMENTS = "1.3.6.1.5.5.7.3.36"
CLAIMS = "1.3.6.1.4.1.62558.2.1"
SERVERS = "1.3.6.1.5.5.7.3.1"
DAY = timedelta(days=1)


def new_key(kind: str = "p256") -> Any:
    if kind == "ed25519":
        return ed25519.Ed25519PrivateKey.generate()
    if kind.startswith("rsa"):
        return rsa.generate_private_key(65537, int(kind.removeprefix("rsa")))
    curves = {"p256": ec.SECP256R1, "p384": ec.SECP384R1, "k256": ec.SECP256K1}
    return ec.generate_private_key(curves[kind]())


def _hash(key: Any) -> Any:
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _usage(*, sign: bool, issue: bool) -> x509.KeyUsage:
    return x509.KeyUsage(sign, False, False, False, False, issue, issue, False, False)


@dataclass
class Authority:
    """A root certificate that signs others."""

    key: Any = field(default_factory=new_key)

    @property
    def certificate(self) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder(_name("Test Root"), _name("Test Root"), self.key.public_key())
            .serial_number(7)
            .not_valid_before(now - 100 * DAY)
            .not_valid_after(now + 1000 * DAY)
            .add_extension(x509.BasicConstraints(True, None), True)
            .add_extension(_usage(sign=False, issue=True), True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()), False)
            .sign(self.key, _hash(self.key))
        )

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(
        self,
        key: Any,
        *,
        purpose: str = EMAIL,
        days: tuple[float, float] = (-10, 100),
        sign: bool = True,
        ca: bool = False,
        issuer_id: bool = True,
    ) -> bytes:
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder(_name("Test Root"), _name("Studio Signer"), key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + days[0] * DAY)
            .not_valid_after(now + days[1] * DAY)
            .add_extension(x509.BasicConstraints(ca, None), True)
            .add_extension(_usage(sign=sign, issue=not sign), True)
            .add_extension(x509.ExtendedKeyUsage([ObjectIdentifier(purpose)]), False)
        )
        if issuer_id:
            public = self.key.public_key()
            identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
            builder = builder.add_extension(identifier, False)
        return builder.sign(self.key, _hash(self.key)).public_bytes(Encoding.PEM)


def key_pem(key: Any, *, password: bytes | None = None) -> bytes:
    lock: KeySerializationEncryption = NoEncryption()
    if password is not None:
        lock = BestAvailableEncryption(password)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)


def write_pair(
    folder: Path, authority: Authority, *, kind: str = "p256", **issued: Any
) -> tuple[str, str]:
    """Files of a certificate, with its authority's behind it, and of its key."""
    folder.mkdir(parents=True, exist_ok=True)
    key = new_key(kind)
    certificate, private = folder / "chain.pem", folder / "key.pem"
    certificate.write_bytes(authority.issue(key, **issued) + authority.pem)
    private.write_bytes(key_pem(key))
    return str(certificate), str(private)
