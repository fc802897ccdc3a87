"""The secrets of the embedded object store, and the files it reads them from.

All of them are in `<data_dir>/secrets/object-store/`, mode 700, apart from the data: a copy of
`objects/` alone does not open what is encrypted in it. One file lasts, `keys.json`: the internal
access key and the key that wraps the keys of encrypted objects. The others are made anew for every
start, because they name absolute paths and need not last: the tokens and certificates with which
the parts of the object store trust each other, and nobody else.
Source: `weed scaffold -config=security` of SeaweedFS 4.48.
"""

from __future__ import annotations

import datetime
import json
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path

from outcrop.errors import ObjectStoreError
from outcrop.store.files import sync, write_private

_CERTIFICATE_DAYS = 3650
# Every section of security.toml that has a certificate, whether this set-up runs that part or not.
_GRPC_PARTS = (
    "volume",
    "master",
    "filer",
    "s3",
    "msg_broker",
    "msg_agent",
    "admin",
    "worker",
    "mq",
)


@dataclass(frozen=True)
class InternalKeys:
    """What must last as long as the objects do."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    sse_key: str = field(repr=False)
    """32 bytes in hexadecimal: wraps the key of every SSE-S3 object."""


def secrets_folder(data_dir: Path) -> Path:
    """Return the folder of the embedded object store's secrets."""
    return data_dir / "secrets" / "object-store"


def objects_folder(data_dir: Path) -> Path:
    """Return the folder of the embedded object store's data."""
    return data_dir / "objects"


def read_internal_keys(data_dir: Path) -> InternalKeys:
    """Return the keys that `make_internal_keys` wrote.

    Raises:
        ObjectStoreError: they are not there or cannot be read.
    """
    file = secrets_folder(data_dir) / "keys.json"
    try:
        return InternalKeys(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ObjectStoreError(
            "InternalError",
            f"The keys of the embedded object store cannot be read from {file}: {error}. "
            "`outcrop serve` makes them at its first start.",
        ) from error


def make_internal_keys(data_dir: Path) -> InternalKeys:
    """Return the keys, made at the first call for a data directory.

    Raises:
        ObjectStoreError: there are objects, but their keys are gone. New keys would leave
            encrypted objects unreadable without a word.
    """
    folder = secrets_folder(data_dir)
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    folder.parent.chmod(0o700)
    file = folder / "keys.json"
    if not file.exists():
        objects = objects_folder(data_dir)
        if objects.is_dir() and any(objects.iterdir()):
            raise ObjectStoreError(
                "InternalError",
                f"{objects} holds objects, but the keys to them, {file}, are gone. Restore that "
                "file from a backup. If nothing in there is needed, remove the folder of objects.",
            )
        keys = InternalKeys(
            access_key_id="outcrop" + secrets.token_hex(8),
            secret_access_key=secrets.token_hex(32),
            sse_key=secrets.token_hex(32),
        )
        for parent in (folder.parent, data_dir):  # a power cut may not take their names either
            sync(parent)
        write_private(file, json.dumps(asdict(keys), indent=1).encode() + b"\n")
    return read_internal_keys(data_dir)


def write_start_files(data_dir: Path, keys: InternalKeys) -> None:
    """Write what the object store reads at its start: identities, security.toml, certificates."""
    folder = secrets_folder(data_dir)
    identity = {
        "name": "outcrop",
        "credentials": [
            {"accessKey": keys.access_key_id, "secretKey": keys.secret_access_key},
        ],
        "actions": ["Admin"],
    }
    files = {
        "s3.json": json.dumps({"identities": [identity]}).encode(),
        **_certificates(),
        "security.toml": _security_toml(folder, keys).encode(),
    }
    for name, content in files.items():
        write_private(folder / name, content, replace=True)


def _security_toml(folder: Path, keys: InternalKeys) -> str:
    """The jwt keys close the volumes' and the filer's HTTP ports, the grpc part all gRPC ports."""
    quoted_ca = json.dumps(str(folder / "ca.crt"))
    certificate = f"cert = {json.dumps(str(folder / 'weed.crt'))}\n"
    certificate += f"key = {json.dumps(str(folder / 'weed.key'))}\n"
    sections = [
        *(
            f'[{name}]\nkey = "{secrets.token_hex(32)}"\n'
            for name in ("jwt.signing", "jwt.signing.read", "jwt.filer_signing")
        ),
        f'[jwt.filer_signing.read]\nkey = "{secrets.token_hex(32)}"\n',
        "[access]\nui = false\n",
        f'[admin]\nuser = "admin"\npassword = "{secrets.token_hex(32)}"\n',
        f'[s3.sse]\nkek = "{keys.sse_key}"\n',
        f"[grpc]\nca = {quoted_ca}\n",
        *(f"[grpc.{part}]\n{certificate}" for part in (*_GRPC_PARTS, "client")),
    ]
    return "\n".join(sections)


def _certificates() -> dict[str, bytes]:
    """A certificate that both ends of every gRPC connection show, and the authority they trust.

    The authority's own key is forgotten: nothing else can ever be signed by it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import (
        Encoding,
        NoEncryption,
        PrivateFormat,
    )
    from cryptography.x509.oid import NameOID

    def named(name: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])

    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    issuer = named("Outcrop object store")
    certificates = {}
    for file, subject, public_key, is_authority in (
        ("ca.crt", issuer, authority_key.public_key(), True),
        ("weed.crt", named("weed"), key.public_key(), False),
    ):
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            # A clock that is set back a little must not make them invalid.
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=_CERTIFICATE_DAYS))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
            .sign(authority_key, hashes.SHA256())
        )
        certificates[file] = certificate.public_bytes(Encoding.PEM)
    certificates["weed.key"] = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificates
