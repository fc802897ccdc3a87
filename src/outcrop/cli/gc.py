"""`outcrop gc`: files that nothing needs any more, and uploads in parts that nobody finished.

Uploads only of the embedded object store: in an S3 of the owner's, others may upload too, and its
lifecycle rules are who ends what they left.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta

from outcrop.errors import ObjectStoreError
from outcrop.jobs import gc
from outcrop.objects.client import object_store
from outcrop.settings import Settings
from outcrop.store.database import check_version, connect

logger = logging.getLogger("outcrop.gc")


@dataclass(frozen=True)
class Collected:
    """Something that was removed, or would be."""

    what: str
    num_bytes: int
    reason: str


def collect_garbage(settings: Settings, *, remove: bool) -> Iterator[Collected]:
    """Yield what nothing needs any more, removing it on the way where `remove` is set.

    Abandoned uploads are in the object store, so they are seen only while the service runs; a
    warning in the log says where they were not.
    """
    engine = connect(settings.effective_database_url)
    check_version(engine)
    try:
        for item in gc.find_garbage(settings, engine):
            if remove:
                gc.remove(item)
            yield Collected(str(item.path), item.num_bytes, item.reason)
    finally:
        engine.dispose()
    if settings.s3_endpoint_url:
        return
    try:
        store = object_store(settings)
        age = timedelta(days=settings.keep_upload_days)
        for upload in store.abandoned_uploads(age):
            if remove:
                store.abort_upload(upload)
            yield Collected(str(upload.uri), 0, f"upload begun {upload.initiated_at:%Y-%m-%d}")
    except ObjectStoreError as error:
        logger.warning("not all abandoned uploads were looked for: %s", error)
