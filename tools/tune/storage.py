"""The database of a study: opened, told in one line what it refuses, and Optuna kept quiet."""

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy

from common.files import CommandError, UsageError
from training.config import fields_in
from training.machine import first_line

# A worker says that it lives every so often; one that was not heard of for so long is dead, and its trial goes to
# another. In seconds.
HEARTBEAT, GRACE = 5, 30
RETRIES = 3  # of a trial whose worker died
ELSEWHERE = fields_in("machine", "place")  # may differ between the machines of a study


def shown(url: str) -> str:
    """The URL of a database without its password; a UsageError if it is none."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except sqlalchemy.exc.ArgumentError:
        raise UsageError(
            "storage: not the URL of a database; it must read like sqlite:///study.db or"
            " postgresql+psycopg://user@host/database"
        ) from None


@contextlib.contextmanager
def using_storage(url: str) -> Iterator[None]:
    """Tell in one line, by a CommandError, what the database ``url`` refuses.

    Left out is what Optuna says of every trial, of features that may still change, and of plots of few trials.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            warnings.filterwarnings("ignore", module="optuna")
            yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise CommandError(f"storage: {shown(url)}: {_innermost(error)}") from None


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """The database ``url``, with Optuna's tables in it; a UsageError if it is none, or without a driver here."""
    is_file = shown(url).startswith("sqlite")
    # SQLite has one writer at a time: wait for it. A connection to a server may have been cut meanwhile.
    of_file = {"connect_args": {"timeout": 60, "isolation_level": None}}
    try:
        storage = _make_tables(
            url,
            engine_kwargs=of_file if is_file else {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES),
        )
    except (sqlalchemy.exc.NoSuchModuleError, ImportError) as error:
        raise UsageError(f"storage: {shown(url)} needs a driver that is not installed: {_innermost(error)}") from None
    if is_file:
        # Optuna takes a queued trial by SELECT ... FOR UPDATE, then UPDATE. SQLite has no FOR UPDATE, and Python's
        # driver would begin a transaction at the UPDATE: two workers could take the same trial. So every transaction
        # begins by taking SQLite's one lock.
        sqlalchemy.event.listen(storage.engine, "begin", lambda begun: begun.exec_driver_sql("BEGIN IMMEDIATE"))
    return storage


def _make_tables(*arguments: Any, **settings: Any) -> optuna.storages.RDBStorage:
    """Optuna's storage. Commands that begin a study at one moment all make its tables: who is late looks again."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return optuna.storages.RDBStorage(*arguments, **settings)
        except sqlalchemy.exc.DBAPIError as error:
            late = isinstance(error, sqlalchemy.exc.IntegrityError) or "already exists" in str(error)
            if not late or time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def open_study(storage: optuna.storages.RDBStorage, name: str, recipe: dict[str, Any]) -> optuna.Study:
    """The study ``name``, new or as it is. ``recipe`` is what its trials have in common, in parts, and kept with it; a
    UsageError if they are of another."""
    study = optuna.create_study(study_name=name, storage=storage, direction="maximize", load_if_exists=True)
    before = study.user_attrs.get("recipe", recipe)
    other = [
        f"{key} ({before[part].get(key)!r}, not {settings.get(key)!r})"
        for part, settings in recipe.items()
        for key in settings | before[part]
        if key not in ELSEWHERE and before[part].get(key) != settings.get(key)
    ]
    if other:
        raise UsageError(
            f"name: the study {name} exists with other settings: {', '.join(other)}; choose another --name"
        )
    study.set_user_attr("recipe", recipe)
    return study
