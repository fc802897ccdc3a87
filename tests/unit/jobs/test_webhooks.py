"""What a webhook is sent, and where it is never sent."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from outcrop.errors import SettingsError
from outcrop.identity.certificates import make_tls_files
from outcrop.jobs.webhooks import (
    EVENT_ID,
    SIGNATURE,
    DeliveryError,
    check_address,
    parse_webhook,
    post,
)
from outcrop.processes.address import GATEWAY, write_address
from outcrop.settings import Settings, load_settings

BODY = b'{"id": "1"}'


class Receiver:
    """A real HTTP server on loopback that answers as a test says."""

    def __init__(self) -> None:
        self.answer: int | None = 200
        """None takes the request, and says nothing but a byte now and then."""
        self.got: list[tuple[str, dict[str, str], bytes]] = []
        self.released = threading.Event()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append((self.path, dict(self.headers), body))
                if receiver.answer is None:
                    while not receiver.released.wait(0.05):
                        self.wfile.write(b"H")
                    return
                self.send_response(receiver.answer)
                self.send_header("Location", "http://169.254.169.254/")
                self.end_headers()

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://receiver.test:{self.port}/hook?key=1"

    def close(self) -> None:
        self.released.set()
        self.server.shutdown()
        self.server.server_close()
        self._thread.join()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


def settings_for(folder: Path, receiver: Receiver, **more: str) -> Settings:
    allow = f"receiver.test:{receiver.port}"
    return Settings(data_dir=folder, event_webhook_allow=allow, **more)  # type: ignore[arg-type]


def at_home(host: str, port: int) -> list[str]:
    """A name server that has every name on loopback."""
    return ["127.0.0.1"]


def test_an_event_is_posted_with_its_id_and_a_signature(tmp_path: Path, receiver: Receiver) -> None:
    settings = settings_for(tmp_path, receiver, event_webhook_secret="s3cret")
    post(settings, parse_webhook(receiver.url), "event-1", BODY, resolve=at_home)
    ((path, headers, body),) = receiver.got
    assert (path, body) == ("/hook?key=1", BODY)
    assert headers["Host"] == f"receiver.test:{receiver.port}"
    assert headers["Content-Type"] == "application/json"
    assert headers[EVENT_ID] == "event-1"
    at, made = (part.partition("=")[2] for part in headers[SIGNATURE].split(","))
    whole = f"{at}.".encode() + body
    assert made == hmac.new(b"s3cret", whole, hashlib.sha256).hexdigest()


def test_without_a_secret_there_is_no_signature(tmp_path: Path, receiver: Receiver) -> None:
    settings = settings_for(tmp_path, receiver)
    post(settings, parse_webhook(receiver.url), "event-1", BODY, resolve=at_home)
    assert SIGNATURE not in receiver.got[0][1]


@pytest.mark.parametrize("status", [302, 400, 500])
def test_what_is_no_success_is_a_failure_and_no_redirection_is_followed(
    tmp_path: Path, receiver: Receiver, status: int
) -> None:
    receiver.answer = status
    settings = settings_for(tmp_path, receiver)
    with pytest.raises(DeliveryError, match=f"answered {status}"):
        post(settings, parse_webhook(receiver.url), "event-1", BODY, resolve=at_home)


def test_a_receiver_that_trickles_is_cut_off(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answer = None
    settings = settings_for(tmp_path, receiver)
    with pytest.raises(DeliveryError, match="does not answer"):
        post(settings, parse_webhook(receiver.url), "1", BODY, resolve=at_home, seconds=0.3)


def test_over_tls_the_certificate_must_be_the_names(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = make_tls_files(Settings(data_dir=tmp_path, tls_names="receiver.test"))
    monkeypatch.setenv("SSL_CERT_FILE", str(files.authority))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server)
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    allow = f"receiver.test:{receiver.port},other.test:{receiver.port}"
    settings = Settings(data_dir=tmp_path, event_webhook_allow=allow)
    webhook = parse_webhook(f"https://receiver.test:{receiver.port}/hook")
    post(settings, webhook, "event-1", BODY, resolve=at_home)
    assert [got[0] for got in receiver.got] == ["/hook"]
    with pytest.raises(DeliveryError, match="certificate"):
        post(settings, replace(webhook, host="other.test"), "event-1", BODY, resolve=at_home)


def test_a_receiver_that_is_not_there_is_a_failure(tmp_path: Path, receiver: Receiver) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings = Settings(data_dir=tmp_path, event_webhook_allow=f"gone.test:{port}")
    with pytest.raises(DeliveryError, match="does not answer"):
        post(settings, parse_webhook(f"http://gone.test:{port}/"), "1", BODY, resolve=at_home)


def test_the_address_that_was_checked_is_the_one_that_is_used(
    tmp_path: Path, receiver: Receiver
) -> None:
    asked: list[str] = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["192.0.2.1"] if len(asked) > 1 else ["127.0.0.1"]

    settings = settings_for(tmp_path, receiver)
    post(settings, parse_webhook(receiver.url), "event-1", BODY, resolve=rebinding)
    assert asked == ["receiver.test"], "the name is asked for once a try"
    assert len(receiver.got) == 1


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "127.8.9.1", "::1", "0.0.0.0", "::", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
     "2002:7f00:1::", "169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254", "224.0.0.1"],
)  # fmt: skip
def test_addresses_that_nobody_means_are_refused_unless_allowed_by_name(
    tmp_path: Path, address: str
) -> None:
    webhook = parse_webhook("http://hook.test:9000/")
    assert check_address(Settings(data_dir=tmp_path), webhook, address)
    with pytest.raises(DeliveryError, match="is refused"):
        post(
            *(Settings(data_dir=tmp_path), webhook, "1", BODY),
            resolve=lambda host, port: [address],
        )
    for allow in ("hook.test:9000", "other.test, hook.test:9000"):
        settings = Settings(data_dir=tmp_path, event_webhook_allow=allow)
        assert check_address(settings, webhook, address) is None
    other = Settings(data_dir=tmp_path, event_webhook_allow="hook.test:9001")
    assert check_address(other, webhook, address)


def test_private_networks_are_where_receivers_of_an_own_service_are(tmp_path: Path) -> None:
    webhook = parse_webhook("https://hook.test/")
    assert webhook.port == 443
    for address in ("10.0.0.7", "192.168.1.7", "fd00::7", "203.0.113.7"):
        assert check_address(Settings(data_dir=tmp_path), webhook, address) is None


def test_a_port_of_the_service_is_refused_on_every_address_of_the_machine(tmp_path: Path) -> None:
    mine = own_address()
    fixed = Settings(data_dir=tmp_path, port=7070)
    assert "own" in str(check_address(fixed, parse_webhook("http://hook.test:7070/"), mine))
    assert check_address(fixed, parse_webhook("http://hook.test:7070/"), "203.0.113.7") is None
    write_address(tmp_path, GATEWAY, "http://127.0.0.1:7171", 1)
    free = Settings(data_dir=tmp_path, port=0, event_webhook_allow="hook.test")
    webhook = parse_webhook("http://hook.test:7171/")
    assert "own" in str(check_address(free, webhook, mine)), "the name alone does not allow it"
    named = Settings(data_dir=tmp_path, port=0, event_webhook_allow="hook.test:7171")
    assert check_address(named, webhook, mine) is None


def own_address() -> str:
    """Return an address of this machine, loopback where there is no other."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing
        except OSError:
            return "127.0.0.1"
        return str(ipaddress.ip_address(probe.getsockname()[0]))


@pytest.mark.parametrize("url", ["ftp://h/", "http://user@h/", "h", "http://h:99999/", "http://"])
def test_a_url_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, url: str) -> None:
    environ = {"OUTCROP_DATA_DIR": str(tmp_path), "OUTCROP_EVENT_WEBHOOK_URLS": url}
    with pytest.raises(SettingsError, match="event_webhook_urls"):
        load_settings(environ)


def test_names_of_webhooks_tell_them_apart_and_hide_their_paths() -> None:
    one, other = (parse_webhook(f"https://hook.test/{key}") for key in ("a-secret", "b"))
    assert one.name != other.name
    assert one.name.startswith("webhook:hook.test:")
    assert "a-secret" not in one.name
