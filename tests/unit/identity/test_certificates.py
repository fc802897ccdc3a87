"""The certificates that the first start with TLS makes, and when they are made again."""

from __future__ import annotations

import contextlib
import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography import x509

from outcrop.errors import SettingsError
from outcrop.identity import certificates
from outcrop.identity.certificates import make_tls_files, server_names
from outcrop.settings import Settings


@pytest.fixture
def settings(data_dir: Path) -> Settings:
    return Settings(data_dir=data_dir, tls=True)


def _server_names(file: Path) -> set[str]:
    certificate = x509.load_pem_x509_certificate(file.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = (str(address) for address in found.get_values_for_type(x509.IPAddress))
    return {*found.get_values_for_type(x509.DNSName), *addresses}


def _speaks(settings: Settings, name: str) -> bool:
    """Say whether a client that trusts the authority takes the server to be `name`."""
    files = make_tls_files(settings)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files.server)
    client = ssl.create_default_context(cafile=files.authority)
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # Python 3.13's own default
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server, server_hostname=name),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    try:
        for _ in range(3):
            for end in ends:
                with contextlib.suppress(ssl.SSLWantReadError):
                    end.do_handshake()
    except ssl.SSLCertVerificationError:
        return False
    return True


def test_a_client_that_trusts_the_authority_takes_the_servers_names(settings: Settings) -> None:
    named = replace(settings, host="192.0.2.7", tls_names="outcrop.example, 198.51.100.9")
    for name in ("localhost", "127.0.0.1", "::1", "192.0.2.7", "outcrop.example", "198.51.100.9"):
        assert _speaks(named, name), name
    assert not _speaks(named, "other.example")


def test_files_are_for_their_owner_only(settings: Settings) -> None:
    files = make_tls_files(settings)
    folder = files.server.parent
    assert folder == settings.data_dir / "secrets" / "tls"
    assert {stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)} == {0o700}
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert b"PRIVATE" not in files.authority.read_bytes() + files.bundle.read_bytes()


def test_later_starts_change_nothing(settings: Settings) -> None:
    folder = make_tls_files(settings).server.parent
    before = {path: path.read_bytes() for path in folder.iterdir()}
    make_tls_files(settings)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_new_name_makes_a_new_certificate_of_the_same_authority(settings: Settings) -> None:
    files = make_tls_files(settings)
    authority = files.authority.read_bytes()
    make_tls_files(replace(settings, host="outcrop.example"))
    assert "outcrop.example" in _server_names(files.server)
    assert files.authority.read_bytes() == authority


def test_a_certificate_that_runs_out_is_made_again(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "SERVER_DAYS", certificates.RENEW_DAYS)
    files = make_tls_files(settings)
    before = files.server.read_bytes()
    monkeypatch.undo()
    make_tls_files(settings)
    assert files.server.read_bytes() != before
    assert _speaks(settings, "localhost")


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_certificate_of_the_server_is_made_again(
    settings: Settings, content: bytes
) -> None:
    make_tls_files(settings).server.write_bytes(content)
    assert _speaks(settings, "localhost")


def test_a_certificate_of_another_authority_is_made_again(settings: Settings) -> None:
    files = make_tls_files(settings)
    (files.server.parent / "authority.pem").unlink()
    assert _speaks(settings, "localhost")


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_authority_is_named_and_not_replaced(settings: Settings, content: bytes) -> None:
    path = make_tls_files(settings).server.parent / "authority.pem"
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"authority\.pem cannot be read"):
        make_tls_files(settings)
    assert path.read_bytes() == content


def test_two_processes_that_make_them_at_once_end_up_with_one_authority(settings: Settings) -> None:
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda _: make_tls_files(settings), range(4)))
    assert len({item.authority.read_bytes() for item in files}) == 1
    assert _speaks(settings, "localhost")


def test_the_bundle_has_the_public_authorities_too(settings: Settings) -> None:
    files = make_tls_files(settings)
    own = ssl.create_default_context(cafile=files.authority).get_ca_certs()
    all_of_them = ssl.create_default_context(cafile=files.bundle).get_ca_certs()
    assert len(own) == 1
    assert own[0] in all_of_them
    assert len(all_of_them) > 50


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_an_address_that_stands_for_all_is_no_name(settings: Settings, host: str) -> None:
    assert host not in server_names(replace(settings, host=host))


def test_a_name_that_cannot_stand_in_a_certificate_is_refused(settings: Settings) -> None:
    with pytest.raises(SettingsError, match=r"'höst' .* cannot stand in a certificate"):
        make_tls_files(replace(settings, host="höst"))
