"""Whatever is typed after ``python main.py``: one line or a run, never a traceback, never a touched file."""

import io
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import contents
from forking import SECONDS
from hypothesis import given, settings
from hypothesis import strategies as st

import main as command
import training.train
from common.files import PROJECT_DIR, UsageError
from training.config import TrainConfig
from training.report import TrainingError

VALUES = st.one_of(
    st.sampled_from(["1", "2", "3", "4", "0", "-1", "1e9", "nan", "inf", "1.5", "0.1", "", " ", "true", "None"]),
    st.sampled_from(["step", "onecycle", "tensor", "torchvision", "cpu", "auto", "cuda:9", "mps", "gpu", "reference"]),
    st.sampled_from(["../x", "a/b", "run", "run_2", ".", "-", "--", "/dev/null", "/proc/x", "x" * 300, "\udc80", "é"]),
    st.integers().map(str),
    st.floats().map(str),
    st.text(alphabet=st.characters(exclude_characters="\0"), max_size=8),
)
NAMES = ["model", "epochs", "scheduler", "max_lr", "lr", "batch_size", "seed", "val_split", "pipeline", "device"]
NAMES += ["threads", "name", "data_dir", "config", "frobnicate", "epoch", "nesterov", "help"]
SWITCHES = [
    "--amp",
    "--no-amp",
    "--compile",
    "--no-compile",
    "--no-kernels",
    "--deterministic",
    "--resume",
    "--help",
    "-h",
    "extra",
]
ARGUMENTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(NAMES).map("--{}".format), VALUES),
        st.tuples(st.sampled_from(NAMES), VALUES).map(lambda pair: ("--{}={}".format(*pair),)),
        st.sampled_from(SWITCHES).map(lambda switch: (switch,)),
        st.sampled_from(NAMES).map(lambda name: (f"--{name}",)),
    ),
    max_size=5,
).map(lambda parts: [word for part in parts for word in part])


@pytest.fixture
def results(a_finished_run, a_stopped_run, tmp_path):
    """A folder with a finished run, mnist_model_1, and one that was stopped, run."""
    folder = shutil.copytree(a_stopped_run, tmp_path / "results")
    for ending in ("_params.pth", "_metrics.json", "_checkpoint.pth", "_checkpoint_before.pth", ".log"):
        shutil.copy(a_finished_run / "outputs" / f"run{ending}", folder / "outputs" / f"mnist_model_1{ending}")
    return folder


def holds(status: int, out: str, error: str, root: Path, before: dict[Path, bytes]) -> None:
    """What must be true of every ending."""
    assert status in (0, 1, 2)
    assert "Traceback" not in out + error
    assert error.count("\n") == (status != 0), error
    assert contents(root) == before


def ended(arguments: list[str]) -> tuple[int, str, str]:
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    with redirect_stdout(out), redirect_stderr(error):
        try:
            status = command.main(arguments)
        except SystemExit as exit_:
            status = int(exit_.code or 0)
    out.seek(0), error.seek(0)
    return status, out.read(), error.read()


@pytest.mark.parametrize("outcome", ["finishes", "fails", "is a mistake"])
@pytest.mark.parametrize("lists", [20, pytest.param(80, marks=pytest.mark.long)])
def test_any_arguments_in_process(results, outcome, lists):
    """Of a training that ends well, and of those that do not."""

    def stub(config, **kwargs):
        assert isinstance(config, TrainConfig)
        if outcome == "fails":
            raise TrainingError("the loss is nan")
        if outcome == "is a mistake":
            raise UsageError("device: 'cuda:9' is not on this machine")
        metrics = {"test_acc": [99.0], "parameters": 1, "total_seconds": 1.0, "environment": {"device": "cpu"}}
        return SimpleNamespace(metrics={**metrics, "name": config.run_name}, files=config.files)

    before = contents(results)

    @settings(max_examples=lists, derandomize=True)
    @given(ARGUMENTS)
    def every(arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.train, "train_and_evaluate", stub)
            holds(*ended([*arguments, "--output_dir", str(results)]), results, before)

    every()


@pytest.mark.long
def test_any_arguments_as_real_processes(results):
    """10 lists, none of which a training can come of: its data does not exist and cannot be fetched."""
    before = contents(results)

    @settings(max_examples=10, derandomize=True)
    @given(ARGUMENTS)
    def every(arguments):
        words = [word.encode("utf-8", "surrogateescape") for word in arguments]
        words += [b"--output_dir", bytes(results), b"--data_dir", b"/proc/no/such/folder"]
        done = subprocess.run(
            [sys.executable, PROJECT_DIR / "main.py", *words], capture_output=True, check=False, timeout=SECONDS
        )
        holds(done.returncode, done.stdout.decode(), done.stderr.decode(), results, before)

    every()
