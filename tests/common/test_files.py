import subprocess
import sys
from pathlib import Path

import pytest

from common.files import PROJECT_DIR, RunFiles, UsageError, atomic_write, existing_runs


def test_atomic_write_replaces_the_file_when_the_block_ends(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:  # noqa: PT012
        file.write(b"ne")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_names_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    script = """
import resource, signal, sys
from pathlib import Path
from common.files import atomic_write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    with atomic_write(Path(sys.argv[1])) as file:
        file.write(bytes(10_000))
except OSError as error:
    print(error)
"""
    command = [sys.executable, "-c", script, path]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert str(path) in done.stdout
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_a_run(tmp_path):
    files = RunFiles("mnist_model_1", tmp_path)
    assert {key: getattr(files, key).relative_to(tmp_path).as_posix() for key in ("params", "metrics", "log")} == {
        "params": "outputs/mnist_model_1_params.pth",
        "metrics": "outputs/mnist_model_1_metrics.json",
        "log": "outputs/mnist_model_1.log",
    }
    assert files.checkpoint == tmp_path / "outputs" / "mnist_model_1_checkpoint.pth"
    assert files.summary == tmp_path / "summaries" / "mnist_model_1_summary.txt"
    assert files.plot == tmp_path / "plots" / "mnist_model_1.png"
    assert RunFiles("x").root == PROJECT_DIR == Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a\\b", ".hidden", "a b", "x\n", "n" * 101, "-x", "a\0"])
def test_a_name_with_a_path_in_it_is_refused(name):
    with pytest.raises(UsageError, match="is not allowed"):
        RunFiles(name)


def test_make_folders_says_what_cannot_be_written(tmp_path):
    RunFiles("x", tmp_path / "new").make_folders()
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["outputs", "plots", "summaries"]
    assert not any(p.is_file() for p in tmp_path.rglob("*"))
    (tmp_path / "blocked").write_text("a file, not a folder")
    with pytest.raises(UsageError, match=r"output_dir: cannot write into .*blocked"):
        RunFiles("x", tmp_path / "blocked").make_folders()


def test_existing_runs(tmp_path):
    assert existing_runs(tmp_path, "_params.pth") == []
    (tmp_path / "outputs").mkdir()
    for name in ("b_params.pth", "a_params.pth", "a_metrics.json", ".c_params.pth.1.partial", ".d_params.pth"):
        (tmp_path / "outputs" / name).touch()
    assert existing_runs(tmp_path, "_params.pth") == ["a", "b"]
