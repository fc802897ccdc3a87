"""The gateway's certificate, and the authority that clients are told to trust for it.

Both are made at the first start with TLS, in `secrets/tls/` (mode 700, files 600):

    authority.pem   the authority's key and certificate; lasts, so that clients need it once
    server.pem      the gateway's key and certificate; made anew where it runs out or lacks a name
    ca.crt          the authority's certificate alone, for AWS_CA_BUNDLE
    bundle.pem      the same, with the public authorities that Python's clients trust, for variables
                    that hold for every address: SSL_CERT_FILE and REQUESTS_CA_BUNDLE

Source: RFC 5280 for the extensions; Python 3.13 checks them strictly (`VERIFY_X509_STRICT`).
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from outcrop.errors import SettingsError
from outcrop.identity.credentials import create_secret
from outcrop.settings import Settings
from outcrop.store.files import write_private

AUTHORITY_DAYS = 3650
SERVER_DAYS = 825
"""Source: the most that Apple's clients take of an authority that its owner added."""
RENEW_DAYS = 90
"""A start makes the server's certificate anew when it is valid no longer than this."""
_BACKDATED = timedelta(days=1)
"""A clock that is set back a little must not make a certificate invalid."""
_EVERYWHERE = ("0.0.0.0", "::")


@dataclass(frozen=True)
class TlsFiles:
    """Where everything is."""

    server: Path
    """For the gateway: its key and certificate."""
    authority: Path
    """For a client that speaks to this service alone."""
    bundle: Path
    """For a client that speaks to others too."""


@dataclass(frozen=True)
class _Identity:
    """A certificate and its key."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    def pem(self) -> bytes:
        return self.key.private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        ) + self.certificate.public_bytes(Encoding.PEM)


def make_tls_files(settings: Settings) -> TlsFiles:
    """Make what is not there yet or does not fit any more, and return where all of it is.

    Raises:
        SettingsError: a file cannot be read or is not what was written there, or a name cannot
            stand in a certificate.
    """
    folder = settings.data_dir / "secrets" / "tls"
    authority = _authority(settings, folder / "authority.pem")
    files = TlsFiles(folder / "server.pem", folder / "ca.crt", folder / "bundle.pem")
    names = server_names(settings)
    if not _still_fits(files.server, authority, names):
        write_private(files.server, _new_server(authority, names).pem(), replace=True)
    own = authority.certificate.public_bytes(Encoding.PEM)
    public = Path(certifi.where()).read_bytes()
    for path, content in ((files.authority, own), (files.bundle, own + b"\\n" + public)):
        if not path.exists() or path.read_bytes() != content:
            write_private(path, content, replace=True)
    return files


def server_names(settings: Settings) -> tuple[str, ...]:
    """Return the names and addresses under which clients may reach the gateway, in order."""
    own = [name.strip() for name in settings.tls_names.split(",")]
    host = "" if settings.host in _EVERYWHERE else settings.host
    names = ("localhost", "127.0.0.1", "::1", host, socket.gethostname(), *own)
    return tuple(sorted({name.lower() for name in names if name}))


def _authority(settings: Settings, path: Path) -> _Identity:
    if not path.exists():
        path.parent.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.parent.parent.chmod(0o700)
        create_secret(path, _new_authority(settings.account).pem())
    return _load(path)


def _load(path: Path) -> _Identity:
    try:
        pem = path.read_bytes()
        key = load_pem_private_key(pem, None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        return _Identity(key, x509.load_pem_x509_certificate(pem))
    except (OSError, ValueError, TypeError, AssertionError) as error:
        raise SettingsError(
            f"{path} cannot be read as a key and a certificate: {error}. Put back what was there, "
            "or remove the file: a new one is made, and clients need the new ca.crt beside it."
        ) from error


def _still_fits(path: Path, authority: _Identity, names: Iterable[str]) -> bool:
    """Say whether the server's certificate can be used for long enough, for these names."""
    try:
        certificate = _load(path).certificate
        certificate.verify_directly_issued_by(authority.certificate)
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (SettingsError, ValueError, TypeError, x509.ExtensionNotFound, InvalidSignature):
        return False  # absent, damaged, or of another authority
    lasts = certificate.not_valid_after_utc - datetime.now(UTC)
    return lasts > timedelta(days=RENEW_DAYS) and list(found) == _alternative_names(names)


def _new_authority(account: str) -> _Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    # Its name tells two installations' authorities apart.
    serial = x509.random_serial_number()
    name = _named(f"Outcrop {account} {serial:x}"[:64])
    builder = _builder(name, name, key, serial, AUTHORITY_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _Identity(
        key, _sign(builder.add_extension(_usage(signs_others=True), True), key, key.public_key())
    )


def _new_server(authority: _Identity, names: Iterable[str]) -> _Identity:
    key = ec.generate_private_key(ec.SECP256R1())
    builder = _builder(
        *(_named("Outcrop gateway"), authority.certificate.subject, key),
        *(x509.random_serial_number(), SERVER_DAYS),
    )
    builder = (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_others=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_alternative_names(names)), critical=False)
    )
    return _Identity(key, _sign(builder, authority.key, authority.key.public_key()))


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, serial: int, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(serial)
        .not_valid_before(now - _BACKDATED)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _sign(
    builder: x509.CertificateBuilder,
    key: ec.EllipticCurvePrivateKey,
    signer: ec.EllipticCurvePublicKey,
) -> x509.Certificate:
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer)
    return builder.add_extension(identifier, critical=False).sign(key, hashes.SHA256())


def _usage(*, signs_others: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_others,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_others,
        crl_sign=signs_others,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(names: Iterable[str]) -> list[x509.GeneralName]:
    return [_alternative_name(name) for name in names]


def _alternative_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError as error:
        raise SettingsError(
            f"{name!r} (host, tls_names or this machine's name) cannot stand in a certificate: "
            f"{error}"
        ) from error


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
