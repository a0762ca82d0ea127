"""What the page is told of runs: from metrics files as they grow, and from processes that live or do not."""

import json
import math
import os
import subprocess
import sys
import time
import urllib.request
from datetime import UTC, datetime, timedelta

import pytest
from forking import SECONDS

from tools.compare.comparer import is_alive, status_of
from tools.web.live import Watcher, means
from visualization import load_metrics_json, save_metrics_json

NOW = datetime.now(UTC).isoformat()


def metrics_of(page_folder, **changes):
    return {
        **load_metrics_json("mnist_model_1", page_folder),
        "status": "running",
        "pid": os.getpid(),
        "updated": NOW,
        **changes,
    }


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_process_and_its_number():
    assert is_alive(os.getpid(), NOW)
    assert not is_alive(dead_pid(), NOW)
    earlier = (datetime.now(UTC) - timedelta(days=3650)).isoformat()
    assert not is_alive(os.getpid(), earlier)  # another process had the number then
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and nobody has asked how
    assert not is_alive(zombie.pid, datetime.now(UTC).isoformat())
    zombie.wait()


@pytest.mark.parametrize("status", ["finished", "interrupted", "failed"])
def test_ends_are_told_apart(page_folder, status):
    assert status_of(metrics_of(page_folder, status=status, pid=dead_pid())) == status
    assert status_of(metrics_of(page_folder)) == "running"
    assert status_of(metrics_of(page_folder, pid=dead_pid())) == "crashed"


def test_means():
    assert means([1.0, 3.0, 5.0, 7.0, 4.0], 2) == [2.0, 6.0, 4.0]
    assert means([], 3) == []


def look(watcher, folder, **changes):
    save_metrics_json(changes, "run", folder)
    time.sleep(0.3)
    (run,) = watcher.look()
    return run


def test_rate_and_time_left(page_folder, tmp_path):
    (tmp_path / "outputs").mkdir()
    whole = metrics_of(page_folder)
    begun = {key: [] for key in ("train_acc", "test_losses", "test_acc", "epoch_seconds")}
    size = whole["config"]["batch_size"]
    an_epoch = math.ceil(60_000 / size)

    def after(batches: int, **told: float):
        part = {key: whole[key][:batches] for key in ("train_losses", "learning_rates")}
        updated = datetime.now(UTC).isoformat()
        return look(watcher, tmp_path, **{**whole, **begun, **part, **told, "updated": updated, "total_seconds": 0.0})

    watcher = Watcher(str(tmp_path))
    first = after(0)
    assert (first.status, first.images_per_second, first.batches_per_epoch) == ("running", None, an_epoch)
    second = after(100, images_per_second=50.0 * size)
    assert second.images_per_second == 50 * size
    assert second.seconds_left == pytest.approx((15 * an_epoch - 100) / 50, rel=0.01)
    assert second.version > first.version
    assert watcher.look()[0].version == second.version
    assert after(40).batches_done == 40  # the same name begins anew


def test_a_page_gets_only_what_is_new(page_folder, tmp_path):
    """2 s: five times it writes and reads the metrics of a whole training."""
    (tmp_path / "outputs").mkdir()
    whole = metrics_of(page_folder)
    watcher, page, sent = Watcher(str(tmp_path)), [], None
    total = len(whole["train_losses"])
    for batches in (3, 20, 21, total * 3 // 5, total):
        part = {key: whole[key][:batches] for key in ("train_losses", "learning_rates")}
        run = look(watcher, tmp_path, **{**whole, **part})
        event = run.event(sent)
        page[event["start"] :] = event["losses"]
        sent = len(run.losses)
        assert page == means(whole["train_losses"][:batches], run.stride)
        assert len(page) <= 1000
    assert len(event["losses"]) < len(page) / 2  # not the whole curve again


def events(address, seconds=SECONDS):
    """The server's events as they come: (name, data)."""
    deadline = time.monotonic() + seconds
    with urllib.request.urlopen(f"{address}/api/live", timeout=60) as stream:
        name = ""
        for line in stream:
            assert time.monotonic() < deadline, "what was waited for did not come"
            key, _, value = line.decode().strip().partition(": ")
            if key == "event":
                name = value
            elif key == "data":
                yield name, json.loads(value)


def test_a_real_training_is_seen_from_begin_to_crash(mnist, tmp_path, serve, python):
    """3 s: a training on all of MNIST in a process of its own."""
    (tmp_path / "outputs").mkdir()
    address, _ = serve("--output_dir", tmp_path)
    stream = events(address)
    assert next(stream) == ("begun", {"runs": 0})
    training = python("main.py", "--epochs", "50", "--name", "watched", "--data_dir", mnist, "--output_dir", tmp_path)
    seen = []
    for name, data in stream:
        assert name == "run"
        seen.append(data)
        if data["batches_done"] > 20 and data["images_per_second"]:
            break
    training.kill()
    assert seen[0]["status"] == "running"
    assert [data["batches_done"] for data in seen] == sorted(data["batches_done"] for data in seen)
    assert seen[-1]["seconds_left"] > 0
    assert next(data for _, data in stream if data["status"] != "running")["status"] == "crashed"


def test_interrupted_is_not_crashed(tiny, tmp_path, serve, python):
    (tmp_path / "outputs").mkdir()
    address, _ = serve("--output_dir", tmp_path)
    stream = events(address)
    training = python("main.py", "--epochs", "10000", "--name", "stopped", "--data_dir", tiny, "--output_dir", tmp_path)
    next(data for name, data in stream if name == "run" and data["epochs_done"] >= 1)
    training.terminate()
    last = next(data for name, data in stream if name == "run" and data["status"] != "running")
    assert last["status"] == "interrupted"
    assert last["batches_per_epoch"] == 3  # of 300 images, not of MNIST's
