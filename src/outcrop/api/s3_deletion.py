"""DeleteObjects with keys that cannot be here: each gets its own error, the others are deleted.

Source: Amazon S3 API Reference, DeleteObjects ("Errors").
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from outcrop.api.s3_actions import S3Call
from outcrop.api.s3_body import DeletedObject, read_deleted_objects
from outcrop.errors import ApiError
from outcrop.objects.keys import check_key

_DIGESTS = re.compile(r"content-md5|x-amz-(sdk-)?checksum-.*")
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
_EMPTY = (
    f'<?xml version="1.0" encoding="UTF-8"?>\n<DeleteResult xmlns="{_NAMESPACE}"></DeleteResult>'
)


@dataclass(frozen=True)
class Deletion:
    """What a DeleteObjects request names, sorted out."""

    objects: list[DeletedObject]
    """Those the store is asked to delete."""
    refused: list[tuple[DeletedObject, ApiError]]

    def body(self, content: bytes) -> bytes:
        """Return the request's body without what is refused."""
        if not self.refused:
            return content
        keys = {item.key for item, _ in self.refused}
        root = ElementTree.fromstring(content.decode("utf-8-sig"))
        for item in list(root):
            if any(_local(member) == "Key" and (member.text or "") in keys for member in item):
                root.remove(item)
        for element in root.iter():
            element.tag = _local(element)
        root.set("xmlns", _NAMESPACE)
        return bytes(ElementTree.tostring(root, encoding="utf-8"))

    def call(self, call: S3Call) -> S3Call:
        """Return the call for that body: digests of the old one would be wrong."""
        if not self.refused:
            return call
        headers = {
            name: value for name, value in call.headers.items() if not _DIGESTS.fullmatch(name)
        }
        return replace(call, headers=headers)

    def answer(self, body: bytes) -> bytes:
        """Return the store's answer with the errors of what was refused.

        Args:
            body: "" where nothing was left to ask of the store.
        """
        errors = "".join(
            f"<Error><Key>{escape(item.key)}</Key>"
            + (f"<VersionId>{escape(item.version_id)}</VersionId>" if item.version_id else "")
            + f"<Code>{error.code}</Code><Message>{escape(error.message)}</Message></Error>"
            for item, error in self.refused
        )
        begin, end, rest = (body or _EMPTY.encode()).rpartition(b"</DeleteResult>")
        if not end:
            begin, end, rest = _EMPTY.encode().rpartition(b"</DeleteResult>")
        return begin + errors.encode() + end + rest


def read_deletion(content: bytes) -> Deletion:
    """Sort out what a request names.

    Raises:
        ApiError: MalformedXML 400.
    """
    objects, refused = [], []
    for item in read_deleted_objects(content):
        try:
            check_key(item.key)
        except ApiError as error:
            refused.append((item, error))
        else:
            objects.append(item)
    return Deletion(objects, refused)


def _local(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]
