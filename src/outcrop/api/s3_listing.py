"""ListObjects, ListObjectsV2, ListObjectVersions: one page as S3 gives it, from the keys in order.

Groups by delimiter, cuts at max-keys and writes the XML; where the keys come from is s3_walk.py.
Continuation tokens hold the last key of a page and are opaque to clients.
Source: Amazon S3 API Reference, ListObjects, ListObjectsV2, ListObjectVersions; S3 User Guide,
"Organizing objects using prefixes".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import quote
from xml.sax.saxutils import escape

from outcrop.api.s3_walk import Entry, Objects, Query, Read, Versions, walk
from outcrop.objects.keys import invalid_argument

LISTINGS = frozenset({"ListObjects", "ListObjectsV2", "ListObjectVersions"})
MAX_KEYS = 1000
_TOKEN_MARK = b"1:"
_ESCAPES = {chr(code): f"&#{code};" for code in (*range(1, 32), 0x7F)}


@dataclass(frozen=True)
class Listing:
    """What a client asks for."""

    operation: str
    bucket: str
    prefix: str
    delimiter: str
    max_keys: int
    after: str
    """Keys up to this one are left out."""
    after_version: str
    """Of the key `after`, versions up to this one only; "": all of them."""
    is_encoded: bool
    """Whether keys are percent-encoded in the answer."""
    with_owner: bool
    given: dict[str, str]
    """The client's parameters, as they were sent."""


def read_listing(operation: str, bucket: str, query: Query) -> Listing:
    """Return what a client asks for.

    Raises:
        ApiError: InvalidArgument 400.
    """
    given = dict(query)
    max_keys = given.get("max-keys", "") or str(MAX_KEYS)
    if not re.fullmatch(r"[0-9]{1,10}", max_keys) or int(max_keys) > 2**31 - 1:
        raise invalid_argument(
            "Argument max-keys must be an integer between 0 and 2147483647", "max-keys", max_keys
        )
    encoding = given.get("encoding-type", "")
    if encoding not in ("", "url"):
        raise invalid_argument(
            "Invalid Encoding Method specified in Request", "encoding-type", encoding
        )
    after = given.get(
        {"ListObjects": "marker", "ListObjectsV2": "start-after"}.get(operation, "key-marker"), ""
    )
    if "continuation-token" in given:
        after = max(after, _read_token(given["continuation-token"]))
    after_version = given.get("version-id-marker", "")
    if after_version and not after:
        raise invalid_argument(
            "A version-id marker cannot be specified without a key marker.",
            "version-id-marker",
            after_version,
        )
    return Listing(
        operation=operation,
        bucket=bucket,
        prefix=given.get("prefix", ""),
        delimiter=given.get("delimiter", ""),
        max_keys=min(int(max_keys), MAX_KEYS),
        after=after,
        after_version=after_version,
        is_encoded=encoding == "url",
        with_owner=operation == "ListObjects" or given.get("fetch-owner") == "true",
        given=given,
    )


async def answer_listing(listing: Listing, read: Read) -> bytes:
    """Return the XML of a page."""
    has_versions = b"<Status>" in await read((("versioning", ""),))
    store: Objects | Versions
    if listing.operation == "ListObjectVersions":
        store = Versions(read)
    elif has_versions:
        store = Versions(read, only_latest=True)
    else:
        store = Objects(read, listing.with_owner)
    page: list[Entry] = []
    is_truncated = False
    async for entry in _entries(listing, store):
        if len(page) >= listing.max_keys:
            is_truncated = listing.max_keys > 0
            break
        page.append(entry)
    return _write(listing, page, is_truncated)


async def _entries(listing: Listing, store: Objects | Versions) -> AsyncIterator[Entry]:
    """Yield what a client sees: keys and common prefixes behind its marker."""
    prefix, delimiter, after = listing.prefix, listing.delimiter, listing.after
    if after and not after.startswith(prefix):
        if after > prefix:
            return
        after = ""
    elif after and listing.after_version and isinstance(store, Versions):
        for entry in _older(await store.of_key(after), listing.after_version):
            yield entry
    # A marker that is a common prefix has been answered, with all that is below it.
    done = after if delimiter and _group(after, prefix, delimiter) == after else ""
    if delimiter == "/":
        async for entry in store.folder(prefix, after):
            is_new = not entry.is_folder or entry.key != done
            if is_new and (not entry.is_folder or await _holds_any(store, entry.key, after)):
                yield entry
        return
    async for entry in walk(store, prefix, after):
        if done and entry.key.startswith(done):
            continue
        group = _group(entry.key, prefix, delimiter) if delimiter else ""
        if group:
            done = group
            entry = Entry(group, "CommonPrefixes")
        yield entry


async def _holds_any(store: Objects | Versions, folder: str, after: str) -> bool:
    """Return whether a folder holds keys: the store keeps empty ones for a while."""
    if not after.startswith(folder):
        page = await store.page(folder, "", limit=1)
        if page.entries or not page.is_truncated:
            return bool(page.entries)
    async for _ in walk(store, folder, after if after.startswith(folder) else ""):
        return True
    return False


def _group(key: str, prefix: str, delimiter: str) -> str:
    """Return the common prefix that a key belongs to, or ""."""
    begin, found, _ = key[len(prefix) :].partition(delimiter)
    return prefix + begin + found if found else ""


def _older(versions: list[Entry], version_id: str) -> list[Entry]:
    """Return the versions of a key behind one, which may be deleted by now."""
    ids = [entry.text("VersionId") for entry in versions]
    if version_id in ids:
        return versions[ids.index(version_id) + 1 :]
    # Ids of the store are greater the older they are.
    return [
        entry
        for entry, found in zip(versions, ids, strict=True)
        if "null" in (found, version_id) or found > version_id
    ]


# --- XML ------------------------------------------------------------------------------------------


def _write(listing: Listing, page: list[Entry], is_truncated: bool) -> bytes:
    given = listing.given
    head = [("Name", listing.bucket), ("Prefix", _shown(listing, listing.prefix))]
    if listing.delimiter:
        head.append(("Delimiter", _shown(listing, listing.delimiter)))
    head.append(("MaxKeys", str(listing.max_keys)))
    if listing.is_encoded:
        head.append(("EncodingType", "url"))
    head.append(("IsTruncated", str(is_truncated).lower()))
    last = page[-1] if page else Entry("", "Contents")
    if listing.operation == "ListObjectsV2":
        head.append(("KeyCount", str(len(page))))
        for name, key in (("start-after", "StartAfter"),):
            if name in given:
                head.append((key, _shown(listing, given[name])))
        if "continuation-token" in given:
            head.append(("ContinuationToken", given["continuation-token"]))
        if is_truncated:
            head.append(("NextContinuationToken", _token(last.key)))
    elif listing.operation == "ListObjects":
        head.append(("Marker", _shown(listing, listing.after)))
        if is_truncated and listing.delimiter:
            head.append(("NextMarker", _shown(listing, last.key)))
    else:
        head.append(("KeyMarker", _shown(listing, listing.after)))
        head.append(("VersionIdMarker", listing.after_version))
        if is_truncated:
            head.append(("NextKeyMarker", _shown(listing, last.key)))
            if not last.is_folder:
                head.append(("NextVersionIdMarker", last.text("VersionId") or "null"))
    root = "ListVersionsResult" if listing.operation == "ListObjectVersions" else "ListBucketResult"
    parts = [
        '<?xml version="1.0" encoding="UTF-8"?>\n'
        f'<{root} xmlns="http://s3.amazonaws.com/doc/2006-03-01/">',
        *(_element(name, value) for name, value in head),
    ]
    parts += [_entry(listing, entry) for entry in page if not entry.is_folder]
    parts += [_entry(listing, entry) for entry in page if entry.is_folder]
    return "".join([*parts, f"</{root}>"]).encode()


def _entry(listing: Listing, entry: Entry) -> str:
    name = "Prefix" if entry.is_folder else "Key"
    inner = _element(name, _shown(listing, entry.key))
    for field, value in entry.fields:
        if field == "Owner" and not (listing.with_owner or entry.kind != "Contents"):
            continue
        text = value if isinstance(value, str) else "".join(_element(*part) for part in value)
        inner += _element(field, text) if isinstance(value, str) else f"<{field}>{text}</{field}>"
    return f"<{entry.kind}>{inner}</{entry.kind}>"


def _element(name: str, text: str) -> str:
    return f"<{name}>{escape(text, _ESCAPES)}</{name}>"


def _shown(listing: Listing, key: str) -> str:
    return quote(key, safe="/-_.~*") if listing.is_encoded else key


def _token(key: str) -> str:
    return base64.urlsafe_b64encode(_TOKEN_MARK + key.encode()).decode("ascii")


def _read_token(token: str) -> str:
    try:
        text = base64.b64decode(token, altchars=b"-_", validate=True)
        if text.startswith(_TOKEN_MARK):
            return text.removeprefix(_TOKEN_MARK).decode("utf-8")
    except (binascii.Error, ValueError):
        pass
    raise invalid_argument(
        "The continuation token provided is incorrect", "continuation-token", token
    )
