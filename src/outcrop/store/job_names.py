"""What keeps a job from being created: names that are taken, and the quota of models.

Asked under `lock_account`, in the transaction that writes the job.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import Connection

from outcrop.errors import ConflictException, ServiceQuotaExceededException
from outcrop.store import models, tables
from outcrop.store.rows import COPY, CUSTOMIZATION, NewJob


def check_names(connection: Connection, new: NewJob) -> None:
    """Refuse a job whose name, or whose model's name, is taken.

    Raises:
        ConflictException: so it is.
    """
    columns = tables.job.c
    mine = (columns.account == new.account, columns.region == new.region)
    same = sa.select(columns.id).where(*mine, columns.kind == new.kind, columns.name == new.name)
    if connection.execute(same).first() is not None:
        raise _name_in_use("job")
    if new.model_name is None:
        return
    being_made = sa.select(columns.id).where(
        *mine, columns.model_name == new.model_name, tables.being_made
    )
    is_taken = models.is_name_taken(connection, new.account, new.region, new.model_name)
    if is_taken or connection.execute(being_made).first() is not None:
        raise _name_in_use("model")


def _name_in_use(what: str) -> ConflictException:
    # At least one widely used client tries again with a new name on exactly this text.
    return ConflictException(f"The provided {what} name is currently in use.")


def check_model_quota(connection: Connection, new: NewJob, limit: int) -> None:
    """Refuse a job where the account has as many models as it may, those being made included.

    Raises:
        ServiceQuotaExceededException: so it is.
    """
    columns = tables.job.c
    live = sa.select(sa.func.count()).where(
        columns.account == new.account,
        columns.region == new.region,
        columns.kind.in_((CUSTOMIZATION, COPY)),  # a model of another kind has its row already
        tables.being_made,
    )
    count = models.count_models(connection, new.account, new.region) + int(
        connection.execute(live).scalar_one()
    )
    if count >= limit:
        raise ServiceQuotaExceededException(
            f"The account has {count} custom models, those being made included; {limit} are "
            "allowed. Delete one, or raise the setting max_custom_models."
        )
