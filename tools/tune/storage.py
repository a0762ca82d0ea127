"""The database of a study: opened, told in one line what it refuses, and Optuna kept quiet."""

import contextlib
import sqlite3
import warnings
from collections.abc import Iterator
from typing import Any

import optuna
import sqlalchemy
from optuna.trial import FrozenTrial

from common.files import CommandError, UsageError
from training.config import fields_in
from training.machine import first_line

# A worker says that it lives every so often; one that was not heard of for so long is dead, and its trial goes to
# another. In seconds.
HEARTBEAT, GRACE = 5, 30
RETRIES = 3  # of a trial whose worker died
ELSEWHERE = fields_in("machine", "place")  # may differ between the machines of a study


class TuneError(CommandError):
    """The study cannot go on; one line says why."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what Optuna says of every trial, of features that may still change, and of plots of few trials."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.filterwarnings("ignore", module="optuna")
        yield


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
def storage_errors(url: str) -> Iterator[None]:
    """Tell in one line, by a TuneError, what the database ``url`` refuses."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise TuneError(f"storage: {shown(url)}: {_innermost(error)}") from None


def open_storage(url: str) -> optuna.storages.RDBStorage:
    """The database ``url``, with Optuna's tables in it; a UsageError if it is none, or without a driver here."""
    # SQLite has one writer at a time: wait for it. A connection to a server may have been cut meanwhile.
    is_file = shown(url).startswith("sqlite")
    try:
        storage = optuna.storages.RDBStorage(
            url,
            engine_kwargs={"connect_args": {"timeout": 60}} if is_file else {"pool_pre_ping": True},
            heartbeat_interval=HEARTBEAT,
            grace_period=GRACE,
            heartbeat_stale_trial_callback=try_again,
        )
    except (sqlalchemy.exc.NoSuchModuleError, ImportError) as error:
        raise UsageError(f"storage: {shown(url)} needs a driver that is not installed: {_innermost(error)}") from None
    if is_file:
        _write_alone(storage.engine)
    return storage


def try_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Queue a trial that was lost once more."""
    optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=RETRIES)(study, trial)


def _write_alone(engine: sqlalchemy.Engine) -> None:
    """Let every transaction of SQLite begin by taking its one lock.

    Optuna takes a queued trial by SELECT ... FOR UPDATE, then UPDATE. SQLite has no FOR UPDATE, and Python's driver
    begins a transaction at the UPDATE: two workers could take the same trial.
    """

    def leave_transactions_alone(connection: sqlite3.Connection, record: object) -> None:
        connection.isolation_level = None

    def begin(connection: sqlalchemy.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    sqlalchemy.event.listen(engine, "connect", leave_transactions_alone)
    sqlalchemy.event.listen(engine, "begin", begin)
    engine.dispose()  # of the connections made before


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return first_line(error)


def open_study(storage: optuna.storages.RDBStorage, name: str, recipe: dict[str, Any]) -> optuna.Study:
    """The study ``name``, new or as it is.

    Args:
        recipe: what its trials have in common, in parts; kept with the study.

    Raises:
        UsageError: its trials are of another recipe.
    """
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
