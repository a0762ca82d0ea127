"""Workers of a study that stop, die, stand still or are many."""

import contextlib
import functools
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import psutil
import pytest
import sqlalchemy
from conftest import eventually, finished
from optuna.trial import TrialState
from test_tune import NAME, forked, load_study, states

from tools.tune import storage as tune_storage

pytestmark = pytest.mark.long
soon = functools.partial(forked, grace=10)  # they are taken for dead after 10 seconds in place of 30


# trials under way that have told once that they live, which a thread of theirs does, and who works on them
UNDER_WAY = """SELECT number, value_json FROM trials JOIN trial_heartbeats USING (trial_id)
JOIN trial_user_attributes USING (trial_id) WHERE state = 'RUNNING' AND key = 'worker'"""


def running_pids(under_way: list[tuple[int, str]]) -> dict[int, int]:
    """Trial number -> process, of those that are not signed by the trial that they were tried again for."""
    signed = {number: json.loads(worker) for number, worker in under_way}
    return {number: worker["pid"] for number, worker in signed.items() if worker["trial"] == number}


def pids_in(folder: Path) -> dict[int, int]:
    """The same of the study in ``folder``, which is only read: Optuna would make tables, and might keep them locked."""
    file = folder / "outputs" / f"tuning_{NAME}.db"
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return running_pids(database.execute(UNDER_WAY).fetchall())


def wait_for(condition, process=None):
    """The first true answer; the study or its tables may not be there yet."""

    def without_errors():
        with contextlib.suppress(Exception):
            return condition()

    return eventually(without_errors, process)


LONG = ["--epochs", 60, "--val_split", 100, "--batch_size", 20]  # some seconds a trial


def is_alive(pid: int) -> bool:
    """Whether a process is there and more than a zombie."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_stopped_and_gone_on(tiny, tmp_path, python, signum):
    flags = ["--trials", 4, "--workers", 2, *LONG, "--data_dir", tiny, "--output_dir", tmp_path]
    process = python(*soon(*flags))
    pids = wait_for(lambda: len(pids := pids_in(tmp_path)) == 2 and pids, process)
    if signum == signal.SIGINT:
        os.killpg(process.pid, signum)  # as a terminal does
    else:
        process.send_signal(signum)
    _, err = process.communicate()
    assert process.returncode == 128 + signum
    assert err.endswith("tune: stopped; what is finished is kept, and the same command goes on\n")
    assert err.count("\n") == 1
    assert not any(is_alive(pid) for pid in pids.values())
    study = load_study(tmp_path)
    assert "RUNNING" not in states(study)
    assert states(study).count("WAITING") == 2
    lost = {trial.number: trial for trial in study.get_trials(states=(TrialState.FAIL,))}
    assert set(lost) >= set(pids)
    done = finished(python(*soon(*flags)))
    assert done.returncode == 0, done.stderr
    after = load_study(tmp_path).get_trials()
    again = [trial for trial in after if "retry_history" in trial.system_attrs]
    assert len(again) == 2
    for trial in again:
        assert trial.state.is_finished()
        before = lost[trial.system_attrs["failed_trial"]]
        assert (trial.params, trial.user_attrs["settings"]) == (before.params, before.user_attrs["settings"])
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in after) == 4


def test_workers_end_with_the_command(tiny, tmp_path, python):
    flags = ["--trials", 4, "--workers", 2, *LONG, "--data_dir", tiny, "--output_dir", tmp_path]
    process = python(*soon(*flags))
    pids = wait_for(lambda: len(pids := pids_in(tmp_path)) == 2 and pids, process)
    process.kill()
    process.wait()
    eventually(lambda: not any(is_alive(pid) for pid in pids.values()))
    assert "RUNNING" not in states(load_study(tmp_path))


def test_a_database_that_breaks(tiny, tmp_path, python):
    flags = ["--trials", 4, "--workers", 2, *LONG, "--data_dir", tiny, "--output_dir", tmp_path]
    process = python(*soon(*flags))
    wait_for(lambda: len(pids := pids_in(tmp_path)) == 2 and pids, process)
    with contextlib.closing(sqlite3.connect(tmp_path / "outputs" / f"tuning_{NAME}.db")) as database:
        database.execute("ALTER TABLE trials RENAME TO lost")
    _, err = process.communicate()
    assert process.returncode == 1
    assert err == f"tune: storage: sqlite:///{tmp_path}/outputs/tuning_{NAME}.db: no such table: trials\n"


def open_each(urls: list[str], together: "threading.Barrier", told: "multiprocessing.SimpleQueue[str]") -> None:
    for url in urls:
        together.wait()
        try:
            tune_storage.open_storage(url)
        except sqlalchemy.exc.SQLAlchemyError as error:
            told.put(str(error))


def test_commands_that_begin_a_study_at_one_moment(tmp_path):
    """As on two machines: Optuna makes a database's tables without looking who else does."""
    context = multiprocessing.get_context("spawn")
    together, told = context.Barrier(3, timeout=60), context.SimpleQueue()
    urls = [f"sqlite:///{tmp_path}/{number}.db" for number in range(5)]
    processes = [context.Process(target=open_each, args=(urls, together, told)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert told.empty(), told.get()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def stop_between_transactions(pid: int, folder: Path) -> None:
    """Let the process stand still where it does not hold SQLite's lock, which would stop all others too."""
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        with contextlib.closing(sqlite3.connect(folder / "outputs" / f"tuning_{NAME}.db", timeout=3)) as database:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:  # locked
                os.kill(pid, signal.SIGCONT)
                time.sleep(0.05)
            else:
                return
    pytest.fail(f"process {pid} always holds the lock")


def test_trials_that_stand_still_are_taken_over(tiny, tmp_path, python):
    # one whose worker died before its first heartbeat, and one whose worker is stopped and wakes up when it is too late
    flags = [*LONG, "--data_dir", tiny, "--output_dir", tmp_path]
    assert finished(python(*soon("--trials", 1, *flags))).returncode == 0
    never_begun = load_study(tmp_path).ask().number
    process = python(*soon("--trials", 3, "--workers", 2, *flags))
    stopped, pid = wait_for(lambda: next(iter(pids_in(tmp_path).items())), process)
    stop_between_transactions(pid, tmp_path)
    wait_for(lambda: load_study(tmp_path).trials[stopped].state.name == "FAIL", process)
    os.kill(pid, signal.SIGCONT)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert err == ""
    trials = load_study(tmp_path).get_trials()
    assert "RUNNING" not in states(load_study(tmp_path))
    assert trials[never_begun].state.name == "FAIL"
    again = {trial.system_attrs["failed_trial"] for trial in trials if "failed_trial" in trial.system_attrs}
    assert again == {never_begun, stopped}
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials) >= 3


@pytest.fixture
def postgresql() -> Iterator[str]:
    """The URL of a database in a PostgreSQL server of its own, on loopback, run by an ordinary user."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    if not programs:
        pytest.fail("PostgreSQL is not installed; Debian: apt-get install postgresql")
    user = "nobody" if os.geteuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    if user:
        shutil.chown(folder, user)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = {"user": user, "cwd": folder, "check": True, "stdout": subprocess.DEVNULL}
    password, data = folder / "password", folder / "data"
    password.write_text("opensesame\n")
    initdb = ["initdb", "-D", data, "-U", "tuner", "--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"]
    subprocess.run([programs[-1] / initdb[0], *initdb[1:]], **options)
    control = [programs[-1] / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
    settings = f"-c listen_addresses=127.0.0.1 -c port={port} -c unix_socket_directories={folder} -c fsync=off"
    subprocess.run([*control, "-o", settings, "start"], **options)
    try:
        yield f"postgresql+psycopg://tuner:opensesame@127.0.0.1:{port}/postgres"
    finally:
        subprocess.run([*control, "-m", "immediate", "stop"], **options)
        shutil.rmtree(folder)


def test_a_killed_worker_on_postgresql(postgresql, tiny, tmp_path, python):
    flags = ["--storage", postgresql, *LONG, "--data_dir", tiny, "--output_dir", tmp_path]
    storage = optuna.storages.RDBStorage(postgresql)  # one for all questions: each keeps its connections
    process = python(*soon("--trials", 7, "--workers", 2, *flags))

    def study() -> optuna.Study:
        return optuna.load_study(study_name=NAME, storage=storage)

    wait_for(lambda: states(study()).count("COMPLETE") >= 2, process)

    def under_way() -> dict[int, int]:
        with storage.engine.connect() as connection:
            return running_pids(connection.execute(sqlalchemy.text(UNDER_WAY)).all())

    killed, pid = wait_for(lambda: next(iter(under_way().items())), process)
    before = study().get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
    os.kill(pid, signal.SIGKILL)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert f"Note: worker {pid} ended early (SIGKILL); its trial was tried again." in out
    after = study().get_trials()
    assert all(after[trial.number] == trial for trial in before)
    assert after[killed].state.name == "FAIL"
    (again,) = [trial for trial in after if trial.system_attrs.get("failed_trial") == killed]
    assert again.params == after[killed].params
    assert again.user_attrs["settings"] == after[killed].user_attrs["settings"]
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in after) == 7
    assert {trial.state.name for trial in after} <= {"COMPLETE", "PRUNED", "FAIL"}
    # the same command on a second machine joins in: at once here, both with the same storage
    both = [python(*soon("--trials", 17, *flags[:-1], tmp_path / name)) for name in ("first", "second")]
    for one in both:
        _, err = one.communicate()
        assert one.returncode == 0, err
    assert (tmp_path / "second" / "outputs").exists()
    trials = study().get_trials()
    assert sum(trial.state.name in ("COMPLETE", "PRUNED") for trial in trials) in (17, 18)
    assert {trial.state.name for trial in trials} <= {"COMPLETE", "PRUNED", "FAIL"}
    assert len({trial.user_attrs["worker"]["pid"] for trial in trials[len(after) :]}) == 2
