"""The keys of a bucket in the order of their UTF-8 bytes, from a store that walks its folders.

The embedded store keeps keys as paths. It lists folder by folder (`a`, `a/1`, `a-`), begins a page
behind a marker's whole folder, and finds a key with versions under its name and `.versions`; S3
lists by bytes (`a`, `a-`, `a/1`). So the store is read one folder at a time here, from the root
down to where a page begins: within a folder, the two orders differ only between a name and longer
names that begin with it, and what is not decided at the end of a page is held back. A prefix with
no more than a page of keys takes one request. Memory: a page of each folder on the way down.
Source: Amazon S3 API Reference, ListObjectsV2 ("UTF-8 binary order"); trying SeaweedFS 4.48.
"""

from __future__ import annotations

import bisect
import heapq
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from urllib.parse import unquote_plus
from xml.etree import ElementTree

STORE_PAGE = 1000
_VERSIONS = ".versions"
"""Ends the name under which the store keeps the versions of a key."""

Query = tuple[tuple[str, str], ...]
Read = Callable[[Query], Awaitable[bytes]]
"""Sends a GET with this query to the bucket and returns the XML."""


@dataclass(frozen=True)
class Entry:
    """A key, a version of one, or a folder."""

    key: str
    kind: str
    """Contents, Version, DeleteMarker, or CommonPrefixes for a folder."""
    fields: tuple[tuple[str, str | tuple[tuple[str, str], ...]], ...] = field(default=())
    """What else the store tells of it, in its order; an Owner has fields of its own."""

    @property
    def is_folder(self) -> bool:
        """Whether it stands for all that begins with its key."""
        return self.kind == "CommonPrefixes"

    def text(self, name: str) -> str:
        """Return one of its fields, or ""."""
        value = dict(self.fields).get(name, "")
        return value if isinstance(value, str) else ""


@dataclass(frozen=True)
class Page:
    """One answer of the store."""

    entries: list[Entry]
    is_truncated: bool


@dataclass(frozen=True)
class Objects:
    """The objects of a bucket that never had versions."""

    read: Read
    with_owner: bool = False

    async def page(
        self, prefix: str, after: str, *, by_folder: bool = False, limit: int = STORE_PAGE
    ) -> Page:
        """Return a page of the store, in its own order."""
        return _parse(
            await self.read(
                (
                    ("list-type", "2"),
                    ("encoding-type", "url"),
                    ("max-keys", str(limit)),
                    ("prefix", prefix),
                    *((("start-after", after),) if after else ()),
                    *((("delimiter", "/"),) if by_folder else ()),
                    *((("fetch-owner", "true"),) if self.with_owner else ()),
                )
            )
        )

    async def folder(self, prefix: str, after: str) -> AsyncIterator[Entry]:
        """Yield keys and folders up to the next slash after `prefix`, in order.

        Folders that `after` is in, or that may follow it, are named without asking whether they
        hold anything.
        """
        folder = _folder_of(prefix)
        name = after[len(folder) :].partition("/")[0]
        heap = [(found.key, found) for found in _passed_folders(prefix, after)]
        heapq.heapify(heap)
        start = folder + name if after else ""
        is_truncated = True
        while is_truncated:
            page = await self.page(prefix, start, by_folder=True)
            for entry in page.entries:
                if entry.key > after:
                    heapq.heappush(heap, (entry.key, entry))
            is_truncated = page.is_truncated and bool(page.entries)
            if is_truncated:
                last = max(entry.key[len(folder) :].rstrip("/") for entry in page.entries)
                while heap and not _may_be_preceded(heap[0][1], folder, last):
                    yield heapq.heappop(heap)[1]
                start = folder + last
        while heap:
            yield heapq.heappop(heap)[1]


@dataclass(frozen=True)
class Versions:
    """The versions of all objects of a bucket, delete markers among them."""

    read: Read
    only_latest: bool = False
    """Give what ListObjects lists: latest versions that are no delete markers, as Contents."""

    async def page(
        self, prefix: str, after: str, *, by_folder: bool = False, limit: int = STORE_PAGE
    ) -> Page:
        """Return a page of the store: what its walk finds first of what is behind `after`."""
        page = await self._raw_page(prefix, after, by_folder=by_folder, limit=limit)
        return Page(self._wanted(_newest_first(page.entries)), page.is_truncated)

    async def folder(self, prefix: str, after: str) -> AsyncIterator[Entry]:
        """Yield versions and folders up to the next slash after `prefix`, in order."""
        folder = _folder_of(prefix)
        held = _passed_folders(prefix, after)
        is_truncated = True
        while is_truncated:
            page = await self._raw_page(prefix, after, by_folder=True)
            names = {entry.key for entry in held}
            entries = held + [entry for entry in page.entries if entry.key not in names]
            held = []
            is_truncated = page.is_truncated and bool(page.entries)
            if is_truncated:
                last = max(entry.key[len(folder) :].rstrip("/") for entry in page.entries)
                # The store cuts the last key's versions off.
                keys = set(sorted(e.key for e in page.entries if not e.is_folder)[-1:])
                # And its walk has not come to `a.versions` where it stands at `a-x.versions`.
                keys |= {
                    folder + last[:end]
                    for end in range(max(1, len(prefix) - len(folder)), len(last) + 1)
                    if last[:end] + _VERSIONS >= last and folder + last[:end] > after
                }
                held = [entry for entry in entries if _may_be_preceded(entry, folder, last)]
                entries = [
                    entry for entry in entries if entry.key not in keys and entry not in held
                ]
                for key in sorted(keys):
                    entries += await self.of_key(key)
                after = max(entry.key for entry in entries)
                # One of them may be what the store cut off.
                names = {entry.key for entry in held}
                held += [
                    entry
                    for entry in _passed_folders(prefix, after)
                    if entry.key > after and entry.key not in names
                ]
            for entry in self._wanted(_newest_first(entries)):
                yield entry

    async def of_key(self, key: str) -> list[Entry]:
        """Return all versions of one key, newest first."""
        found: list[Entry] = []
        more: Query = ()
        is_truncated = True
        while is_truncated:
            page = _parse(await self.read((*_versions_query(f"{key}{_VERSIONS}/"), *more)))
            found += page.entries
            is_truncated = page.is_truncated and bool(page.entries)
            if found:
                oldest = found[-1].text("VersionId")
                more = (("key-marker", key), ("version-id-marker", oldest))
        # One from before there were versions is kept under the name itself, and listed as oldest.
        query = (*_versions_query(key, 2), ("delimiter", "/"), *more)
        found += [
            entry
            for entry in _parse(await self.read(query)).entries
            if entry.key == key and not entry.is_folder
        ]
        return _newest_first({entry.text("VersionId"): entry for entry in found}.values())

    async def _raw_page(
        self, prefix: str, after: str, *, by_folder: bool = False, limit: int = STORE_PAGE
    ) -> Page:
        query = _versions_query(prefix, limit)
        if after:
            query += (("key-marker", after),)
        if by_folder:
            query += (("delimiter", "/"),)
        return _parse(await self.read(query))

    def _wanted(self, entries: list[Entry]) -> list[Entry]:
        if not self.only_latest:
            return entries
        return [
            entry
            if entry.is_folder
            else Entry(
                entry.key,
                "Contents",
                tuple(item for item in entry.fields if item[0] not in ("VersionId", "IsLatest")),
            )
            for entry in entries
            if entry.is_folder or (entry.kind == "Version" and entry.text("IsLatest") == "true")
        ]


async def walk(store: Objects | Versions, prefix: str, after: str) -> AsyncIterator[Entry]:
    """Yield everything whose key begins with `prefix` and is greater than `after`, in order.

    Args:
        after: "" or a key that begins with `prefix`.
    """
    page = None if after else await store.page(prefix, "")
    if page is not None and not page.is_truncated:
        for entry in sorted(page.entries, key=lambda entry: entry.key):
            yield entry
        return
    siblings = _Siblings(store, _folder_of(prefix), prefix, page)
    async for entry in store.folder(prefix, after):
        inside = after if after.startswith(entry.key) else ""
        below = None if inside else await siblings.all_below(entry)
        if below is not None:
            for found in below:
                yield found
        elif entry.is_folder:
            async for found in walk(store, entry.key, inside):
                yield found
        else:
            yield entry


@dataclass
class _Siblings:
    """Folders side by side: small ones are read together, with one request for many."""

    store: Objects | Versions
    folder: str
    prefix: str
    page: Page | None
    """Of all keys behind the name `begins`, whatever their depth."""
    begins: str = ""
    passed: list[str] = field(default_factory=list)
    """Names that were given out, least first."""

    async def all_below(self, entry: Entry) -> list[Entry] | None:
        """Return all that is below a folder, or None where it is no folder or a large one."""
        name = entry.key[len(self.folder) :].rstrip("/")
        place = bisect.bisect_left(self.passed, name)
        before = self.passed[place - 1] if place else ""
        if self.passed[place : place + 1] != [name]:
            self.passed.insert(place, name)
        if not entry.is_folder or isinstance(self.store, Versions):
            return None
        if before and not (self.page and self.begins < name <= self._last()):
            self.page = await self.store.page(self.prefix, self.folder + before)
            self.begins = before
        if self.page is None or not self.begins < name < self._last():
            return None
        found = [below for below in self.page.entries if below.key.startswith(entry.key)]
        return sorted(found, key=lambda below: below.key)

    def _last(self) -> str:
        if self.page is None or not self.page.is_truncated or not self.page.entries:
            return chr(0x10FFFF)
        return self.page.entries[-1].key[len(self.folder) :].partition("/")[0]


def _folder_of(prefix: str) -> str:
    return prefix[: prefix.rfind("/") + 1]


def _passed_folders(prefix: str, after: str) -> list[Entry]:
    """Return the folders that the store leaves out behind a marker, be there such or not.

    It goes on behind the marker's whole name; but behind `a-x` comes the folder `a/`, too.
    """
    folder = _folder_of(prefix)
    name = after[len(folder) :].partition("/")[0]
    return [
        Entry(found, "CommonPrefixes")
        for end in range(max(1, len(prefix) - len(folder)), len(name) + 1)
        if end == len(name) or name[end] < "/"
        for found in [f"{folder}{name[:end]}/"]
        if found > after or after.startswith(found)
    ]


def _may_be_preceded(entry: Entry, folder: str, last: str) -> bool:
    """Return whether names that come after `last` in the store may belong before a folder."""
    name = entry.key[len(folder) : -1]
    rest = last[len(name) :]
    return entry.is_folder and last.startswith(name) and (not rest or rest[0] < "/")


def _versions_query(prefix: str, limit: int = STORE_PAGE) -> Query:
    return (("versions", ""), ("max-keys", str(limit)), ("prefix", prefix))


def _newest_first(entries: Iterable[Entry]) -> list[Entry]:
    """Sort by key, and by age within a key: ids of the store are less the newer they are."""
    found = sorted(entries, key=lambda entry: entry.text("VersionId"))
    found.sort(key=lambda entry: entry.text("LastModified"), reverse=True)
    return sorted(found, key=lambda entry: (entry.key, entry.text("IsLatest") == "false"))


def _parse(body: bytes) -> Page:
    entries = []
    is_truncated = is_encoded = False
    for element in ElementTree.fromstring(body):
        kind = _local(element)
        if kind == "IsTruncated":
            is_truncated = element.text == "true"
        elif kind == "EncodingType":
            is_encoded = element.text == "url"
        elif kind in ("Contents", "Version", "DeleteMarker", "CommonPrefixes"):
            fields = {
                _local(item): tuple((_local(part), part.text or "") for part in item)
                if len(item)
                else item.text or ""
                for item in element
            }
            key = fields.pop("Prefix" if kind == "CommonPrefixes" else "Key")
            assert isinstance(key, str)
            entries.append(Entry(key, kind, tuple(fields.items())))
    if is_encoded:
        entries = [Entry(unquote_plus(entry.key), entry.kind, entry.fields) for entry in entries]
    return Page(entries, is_truncated)


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
