"""Which keys an object may have: S3's limits, and those of the embedded store."""

from __future__ import annotations

from outcrop.errors import ApiError

MAX_KEY_BYTES = 1024
"""Source: Amazon S3 user guide, "Naming Amazon S3 objects"."""
MAX_SEGMENT_BYTES = 255
"""LIMIT: of the embedded store, for what stands between two slashes of a key."""


def check_key(key: str) -> None:
    """Refuse a key that cannot be kept as it is, or that would name something else.

    The embedded store keeps keys as paths: it takes `a//b` and `a\\b` for `a/b`, and has folders
    of its own for the parts of uploads and for old versions. A policy is decided on the key as it
    was sent, so a key that means another one there must not get that far.

    Raises:
        ApiError: InvalidURI, KeyTooLongError or InvalidArgument, 400.
    """
    if len(key.encode()) > MAX_KEY_BYTES:
        raise ApiError("Your key is too long", code="KeyTooLongError", http_status=400)
    *folders, name = key.split("/")
    for segment in (*folders, name) if name else folders:
        if segment in ("", ".", "..") or "\0" in segment or "\\" in segment:
            raise invalid_argument(
                "Keys with an empty part (//), a part . or .., a backslash or a zero byte are not "
                "supported.",
                "key",
                key,
            )
        if len(segment.encode()) > MAX_SEGMENT_BYTES:
            raise ApiError(
                f"Your key is too long: a part between two slashes may have {MAX_SEGMENT_BYTES} "
                "bytes.",
                code="KeyTooLongError",
                http_status=400,
            )
    if folders and (
        folders[0] == ".uploads" or any(folder.endswith(".versions") for folder in folders)
    ):
        raise invalid_argument(
            "Keys below .uploads/ or below a folder that ends in .versions are not supported.",
            "key",
            key,
        )


def invalid_argument(message: str, name: str, value: str) -> ApiError:
    """Return S3's error for an argument that cannot be, which names it."""
    return ApiError(
        message,
        code="InvalidArgument",
        http_status=400,
        members={"ArgumentName": name, "ArgumentValue": value[:200]},
    )
