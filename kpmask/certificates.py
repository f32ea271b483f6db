"""Who signs: a certificate chain and its key, checked before they are used.

- Somebody's own, as files: PEM, the signer's certificate first, then those that issued it.
- Else a development certificate, made once for each user of a machine. It says in its subject
  that it is not to be trusted: anybody can make another. The key that issued it is thrown away, so
  that it issues nothing else.

What a certificate must be: C2PA 2.2, 14.5.1 (certificate profile).
"""

from __future__ import annotations

import hashlib
import itertools
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kpmask.errors import ConfigError

DEVELOPMENT_NAME: Final = "kpmask development, not trusted"
DEVELOPMENT_YEARS: Final = 20  # a signature ends with its certificate

# What a certificate may be for: C2PA's claim signing, signing documents, protecting e-mail.
PURPOSES: Final = (
    "1.3.6.1.4.1.62558.2.1",
    "1.3.6.1.5.5.7.3.36",
    ExtendedKeyUsageOID.EMAIL_PROTECTION.dotted_string,
)

CERTIFICATE: Final = "credentials.certificate"
PRIVATE_KEY: Final = "credentials.private_key"

_MAX_FILE_BYTES: Final = 2**20
_MIN_RSA_BITS: Final = 2048
_CURVES: Final = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey | rsa.RSAPrivateKey
E = TypeVar("E", bound=x509.ExtensionType)


@dataclass(frozen=True, slots=True)
class Signer:
    """A certificate chain with its key, in PEM. It passes to workers by value.

    Attributes:
        subject: the certificate's common name, else its whole subject.
        algorithm: C2PA's name: es256, es384, es512, ps256, ed25519.
        sha256: of the certificate.
    """

    subject: str
    algorithm: str
    sha256: str
    certificates_pem: bytes = field(repr=False)
    private_key_pem: bytes = field(repr=False)


# --- somebody's own --------------------------------------------------------------------------


def load(certificate: str | Path, private_key: str | Path) -> Signer:
    """The signer of a certificate chain and a key file.

    Raises:
        ConfigError: one of them is missing, broken, expired, not for signing, or not the other's.
    """
    chain = _read_chain(Path(certificate))
    key = _read_key(Path(private_key))
    _check_times(chain)
    _check_usage(chain[0])
    _check_order(chain)
    if _public_der(key.public_key()) != _public_der(chain[0].public_key()):
        raise ConfigError(
            f"{private_key} is not the key of {certificate}",
            subject=PRIVATE_KEY,
            hint="the key that the certificate was asked for with; its certificate comes first",
        )
    return _signer(chain, key)


def _read(path: Path, subject: str, what: str) -> bytes:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES or not path.is_file():
            raise ConfigError(f"{path} is no {what}", subject=subject, hint="a small PEM file")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror or error}", subject=subject, hint=f"the path of the {what}"
        ) from error


def _read_chain(path: Path) -> list[x509.Certificate]:
    data = _read(path, CERTIFICATE, "certificate")
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError as error:
        raise ConfigError(
            f"{path} has no certificate in PEM form",
            subject=CERTIFICATE,
            hint="openssl x509 -inform der -in FILE -out cert.pem",
        ) from error


def _read_key(path: Path) -> PrivateKey:
    data = _read(path, PRIVATE_KEY, "private key")
    try:
        key = load_pem_private_key(data, password=None)
    except TypeError as error:
        raise ConfigError(
            f"{path} is locked by a password",
            subject=PRIVATE_KEY,
            hint="openssl pkey -in FILE -out key.pem; keep it readable by you alone",
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"{path} has no private key in PEM form",
            subject=PRIVATE_KEY,
            hint="openssl pkey -inform der -in FILE -out key.pem",
        ) from error
    if not isinstance(key, PrivateKey) or not _algorithm(key):
        raise ConfigError(
            f"{path} is a key that cannot sign content credentials",
            subject=PRIVATE_KEY,
            hint="P-256, P-384, P-521, Ed25519, or RSA of 2048 bits and more",
        )
    return key


def _check_times(chain: Sequence[x509.Certificate]) -> None:
    now = datetime.now(UTC)
    for one in chain:
        if one.not_valid_after_utc <= now:
            raise ConfigError(
                f"{_name(one)} expired on {one.not_valid_after_utc:%Y-%m-%d}",
                subject=CERTIFICATE,
                hint="renew it, or leave it out for a development certificate",
            )
        if one.not_valid_before_utc > now:
            raise ConfigError(
                f"{_name(one)} is not valid before {one.not_valid_before_utc:%Y-%m-%d}",
                subject=CERTIFICATE,
                hint="wait for it, or set this machine's clock",
            )


def _check_usage(leaf: x509.Certificate) -> None:
    """What a signer's certificate must be for, and must not be."""
    usage = _extension(leaf, x509.KeyUsage)
    purposes = _extension(leaf, x509.ExtendedKeyUsage) or ()
    constraints = _extension(leaf, x509.BasicConstraints)
    if leaf.issuer == leaf.subject:
        cause = "signs itself, which content credentials refuse"
    elif constraints is not None and constraints.ca:
        cause = "is for issuing certificates, not for signing files"
    elif usage is None or not usage.digital_signature:
        cause = "is not for digital signatures (key usage)"
    elif not {purpose.dotted_string for purpose in purposes} & set(PURPOSES):
        cause = "is not for signing claims (extended key usage)"
    elif _extension(leaf, x509.AuthorityKeyIdentifier) is None:
        cause = "does not say which key issued it (authority key identifier)"
    else:
        return
    raise ConfigError(
        f"{_name(leaf)} {cause}",
        subject=CERTIFICATE,
        hint="the signer's certificate comes first in the file; it must be for digital signatures "
        "and for C2PA claim signing, document signing or e-mail protection",
    )


def _check_order(chain: Sequence[x509.Certificate]) -> None:
    for one, issuer in itertools.pairwise(chain):
        try:
            one.verify_directly_issued_by(issuer)
        except (ValueError, TypeError, InvalidSignature) as error:
            raise ConfigError(
                f"{_name(issuer)} did not issue {_name(one)}",
                subject=CERTIFICATE,
                hint="the signer's certificate first, then the one that issued it, and so on",
            ) from error


def _signer(chain: Sequence[x509.Certificate], key: PrivateKey) -> Signer:
    return Signer(
        subject=_name(chain[0]),
        algorithm=_algorithm(key),
        sha256=hashlib.sha256(chain[0].public_bytes(Encoding.DER)).hexdigest(),
        certificates_pem=b"".join(one.public_bytes(Encoding.PEM) for one in chain),
        private_key_pem=_key_pem(key),
    )


def _algorithm(key: PrivateKey) -> str:
    """C2PA's name of how a key signs; empty where it cannot."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    if isinstance(key, rsa.RSAPrivateKey):
        return "ps256" if key.key_size >= _MIN_RSA_BITS else ""
    return _CURVES.get(key.curve.name, "")


def _name(certificate: x509.Certificate) -> str:
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else certificate.subject.rfc4514_string()


def _extension(certificate: x509.Certificate, extension_type: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(extension_type).value
    except (x509.ExtensionNotFound, ValueError):
        return None


def _public_der(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


# --- for development -------------------------------------------------------------------------


def development_file() -> Path:
    """$KPMASK_HOME, else the user's state folder, and in it the certificate with its key."""
    if given := os.environ.get("KPMASK_HOME"):
        folder = Path(given).expanduser()
    elif given := os.environ.get("XDG_STATE_HOME"):
        folder = Path(given) / "kpmask"
    else:
        folder = Path(os.environ.get("HOME", "/nonexistent")) / ".local" / "state" / "kpmask"
    return folder.absolute() / "credentials" / "development.pem"


def development() -> Signer:
    """This user's development certificate on this machine; made if there is none that holds.

    Raises:
        ConfigError: it cannot be made or read.
    """
    path = development_file()
    try:
        if not path.exists():
            _make(path)
        signer = _development(path)
        if signer is None:  # expired, or damaged
            path.unlink()
            _make(path)
            signer = _development(path)
    except OSError as error:
        raise ConfigError(
            f"no development certificate can be kept in {path.parent}: {error.strerror or error}",
            subject="credentials",
            hint="set KPMASK_HOME to a folder of yours; give credentials.certificate and "
            "credentials.private_key; or --no-credentials",
        ) from error
    assert signer is not None, "just made"
    return signer


def _development(path: Path) -> Signer | None:
    data = path.read_bytes()
    try:
        chain = x509.load_pem_x509_certificates(data)
        key = load_pem_private_key(data[data.index(b"-----BEGIN PRIVATE") :], password=None)
        _check_times(chain)
    except (ValueError, ConfigError):
        return None
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return _signer(chain, key)


def _make(path: Path) -> None:
    """Write the file whole, for its owner alone; another process's, made meanwhile, stays."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    signer = make_development()
    beside = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(signer.certificates_pem + signer.private_key_pem)
        try:
            os.link(beside, path)
        except FileExistsError:
            return
    finally:
        beside.unlink(missing_ok=True)


def make_development(*, not_after: datetime | None = None) -> Signer:
    """A new certificate of that kind, and one that issued it, whose key nobody has."""
    root_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    not_after = not_after or datetime.now(UTC) + timedelta(days=365 * DEVELOPMENT_YEARS)
    root = (
        _builder(f"{DEVELOPMENT_NAME} (issuer)", root_key, not_after)
        .issuer_name(_subject(f"{DEVELOPMENT_NAME} (issuer)"))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(issuing=True), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key())
    leaf = (
        _builder(DEVELOPMENT_NAME, key, not_after)
        .issuer_name(root.subject)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(issuing=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), False)
        .add_extension(issuer_id, critical=False)
        .sign(root_key, hashes.SHA256())
    )
    return _signer([leaf, root], key)


def _builder(
    name: str, key: ec.EllipticCurvePrivateKey, not_after: datetime
) -> x509.CertificateBuilder:
    not_before = min(datetime.now(UTC), not_after) - timedelta(days=1)  # clocks differ
    return (
        x509.CertificateBuilder()
        .subject_name(_subject(name))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _subject(name: str) -> x509.Name:
    """Viewers show the one or the other, so both say it."""
    attributes = [(NameOID.ORGANIZATION_NAME, DEVELOPMENT_NAME), (NameOID.COMMON_NAME, name)]
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in attributes])


def _key_usage(*, issuing: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not issuing,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=issuing,
        crl_sign=issuing,
        encipher_only=False,
        decipher_only=False,
    )
