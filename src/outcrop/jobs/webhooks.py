"""Send one event to a webhook, at an address that was looked at before it is used.

A name is resolved once for each try, and the connection goes to the address that was checked: a
name server that answers otherwise the next time (DNS rebinding) changes nothing. Loopback,
link-local addresses (where clouds keep their credentials) and our own ports are refused, unless
the operator allows them by name. Redirections are not followed.
"""

from __future__ import annotations

import hashlib
import hmac
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from outcrop.objects.client import EMBEDDED_NAME
from outcrop.processes.address import GATEWAY, last_port
from outcrop.settings import Settings

ANSWER_SECONDS = 10.0
"""How long a receiver may take, from the connection to its answer's head."""
SIGNATURE, EVENT_ID = "Outcrop-Signature", "Outcrop-Event-Id"
_PORTS = {"http": 80, "https": 443}
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Sequence[str]]


class DeliveryError(Exception):
    """An event could not be delivered; the message says why, for its owner."""


@dataclass(frozen=True)
class Webhook:
    """A receiver, taken apart."""

    scheme: str
    host: str
    port: int
    path: str
    """With the query."""

    @property
    def name(self) -> str:
        """What it is called where its URL, which may hold a secret, must not be shown."""
        whole = f"{self.scheme}://{self.host}:{self.port}{self.path}"
        return f"webhook:{self.host}:{hashlib.sha256(whole.encode()).hexdigest()[:8]}"[:128]


def parse_webhook(url: str) -> Webhook:
    """Take a URL apart whose form the settings have checked."""
    parts = urlsplit(url)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    port = parts.port or _PORTS[parts.scheme]
    return Webhook(parts.scheme, (parts.hostname or "").lower(), port, path)


def split_list(text: str) -> tuple[str, ...]:
    """Return the entries of a setting that is a list."""
    return tuple(entry for part in text.split(",") if (entry := part.strip()))


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, in the order to try them."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def check_address(settings: Settings, webhook: Webhook, text: str) -> str | None:
    """Return why a webhook may not be at an address, or None where it may."""
    allowed = {entry.lower() for entry in split_list(settings.event_webhook_allow)}
    host = f"[{webhook.host}]" if ":" in webhook.host else webhook.host
    if f"{host}:{webhook.port}" in allowed:
        return None
    address = _plain(ipaddress.ip_address(text.partition("%")[0]))
    how = f"Add {host}:{webhook.port} to event_webhook_allow if it is meant."
    if webhook.port in _own_ports(settings) and _is_ours(address):
        return f"{address} is this machine, and port {webhook.port} is this service's own. {how}"
    if webhook.host in allowed:
        return None
    if address.is_loopback or address.is_unspecified:
        return f"{address} is this machine's loopback. {how}"
    if address.is_link_local:
        return f"{address} is a link-local address. {how}"
    if address.is_multicast or address == ipaddress.ip_address("255.255.255.255"):
        return f"{address} is no single machine's address."
    return None


def _plain(address: Address) -> Address:
    """Return the IPv4 address that an IPv6 address stands for, where it does."""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return address.ipv4_mapped
        if address.sixtofour is not None:
            return address.sixtofour
        if address in _NAT64:
            return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _own_ports(settings: Settings) -> set[int]:
    parts = (last_port(settings.data_dir, part) for part in (GATEWAY, EMBEDDED_NAME))
    return {settings.port, *parts} - {0}


def _is_ours(address: Address) -> bool:
    """Whether an address is one of this machine's: only those can be bound."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((str(address), 0))
    except OSError:
        return False
    return True


def signature(secret: str, body: bytes, at: int) -> str:
    """Return the signature header's value: a receiver computes it again and compares.

    Args:
        at: seconds since 1970; signed, too, so that an old event cannot be sent again later.
    """
    made = hmac.new(secret.encode(), f"{at}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={made}"


def post(
    settings: Settings,
    webhook: Webhook,
    event_id: str,
    body: bytes,
    *,
    resolve: Resolve = resolve,
    seconds: float = ANSWER_SECONDS,
) -> None:
    """Send an event; returns once the receiver has answered that it has it.

    Args:
        resolve: gives the addresses of a name; tests have a name server of their own.
    Raises:
        DeliveryError: it may not be sent there, or the receiver did not take it.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "outcrop",
        "Connection": "close",
        EVENT_ID: event_id,
    }
    if settings.event_webhook_secret:
        headers[SIGNATURE] = signature(settings.event_webhook_secret, body, int(time.time()))
    address = _choose(settings, webhook, resolve)
    connection: http.client.HTTPConnection
    if webhook.scheme == "https":
        connection = _SecureTo(webhook, address, seconds)
    else:
        connection = _To(webhook, address, seconds)
    try:
        connection.connect()
        # A time-out is of one read; a receiver that sends a byte now and then is cut off by this.
        cutter = threading.Timer(seconds, _cut, [connection.sock])
        cutter.start()
        try:
            connection.request("POST", webhook.path, body, headers)
            status = connection.getresponse().status
        finally:
            cutter.cancel()
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise DeliveryError(f"{webhook.host} does not answer: {reason}") from error
    finally:
        connection.close()
    if not 200 <= status < 300:
        raise DeliveryError(f"{webhook.host} answered {status}.")


def _choose(settings: Settings, webhook: Webhook, resolve: Resolve) -> str:
    """Return the first address of a webhook that may be used."""
    try:
        addresses = resolve(webhook.host, webhook.port)
    except (OSError, UnicodeError) as error:
        raise DeliveryError(f"{webhook.host} has no address: {error}") from error
    refused = ""
    for address in addresses:
        reason = check_address(settings, webhook, address)
        if reason is None:
            return address
        refused = refused or reason
    raise DeliveryError(f"{webhook.host} is refused: {refused or 'it has no address.'}")


def _cut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # it has ended by itself
        return


class _To(http.client.HTTPConnection):
    """A connection to an address that was checked, under the name that it was checked for."""

    def __init__(self, webhook: Webhook, address: str, seconds: float) -> None:
        super().__init__(webhook.host, webhook.port, timeout=seconds)
        self._address, self._seconds = address, seconds

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self._seconds)


class _SecureTo(http.client.HTTPSConnection):
    """The same over TLS: the certificate must be the name's."""

    def __init__(self, webhook: Webhook, address: str, seconds: float) -> None:
        self._context_of_host = ssl.create_default_context()
        super().__init__(webhook.host, webhook.port, timeout=seconds, context=self._context_of_host)
        self._address, self._seconds = address, seconds

    def connect(self) -> None:
        plain = socket.create_connection((self._address, self.port), self._seconds)
        try:
            self.sock = self._context_of_host.wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise
