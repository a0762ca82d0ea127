"""Where a run's files are, and how a file is written so that nothing is lost.

files = RunFiles("mnist_model_1")            # under the project
files = RunFiles("trial", "/tmp/results")    # under a folder of your own
with atomic_write(files.metrics) as f:
    f.write(b"...")
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

PROJECT_DIR = Path(__file__).resolve().parents[1]
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a run


class UsageError(ValueError):
    """A mistake of the user's that one line can explain; a command prints that line and exits with 2."""


class CommandError(RuntimeError):
    """What a command could not do, in one line; the command prints that line and exits with 1."""


class DamagedFileError(CommandError):
    """A file is not what its name says; one line says which and why."""


@contextmanager
def atomic_write(path: Path, durable: bool = True, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file beside ``path`` for writing and rename it into place when the block ends without an error.

    Whatever stood under ``path`` stays whole until the rename, and for good if the block fails.

    Args:
        path: the final name; its folder exists.
        durable: wait until the disk has the bytes and the name, so that they survive a power cut.
        keep: a name for what stood under ``path``; between two renames it is the only one of the two.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if durable:
            _flush_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say by itself which file it was
        raise


def _flush_folder(folder: Path) -> None:
    """Wait until the disk has the names in ``folder``, where the system lets one ask for that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@dataclass(frozen=True)
class _FileOfRun:
    """A property of ``RunFiles``: the path of this form under the root, with the run's name in it."""

    form: str

    def __get__(self, files: "RunFiles", owner: object = None) -> Path:
        return files.root / self.form.format(files.name)


@dataclass(frozen=True)
class RunFiles:
    """The files of the run ``name`` under ``output_dir`` (None: the project itself).

    Raises:
        UsageError: the name is not a plain file name.
    """

    name: str
    output_dir: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise UsageError(
                f"name: {self.name!r} is not allowed; a run's name is up to 100 letters, digits, '.', '_' and '-'"
                " and starts with a letter or digit"
            )

    @property
    def root(self) -> Path:
        return PROJECT_DIR if self.output_dir is None else Path(self.output_dir)

    params = _FileOfRun("outputs/{}_params.pth")
    metrics = _FileOfRun("outputs/{}_metrics.json")
    checkpoint = _FileOfRun("outputs/{}_checkpoint.pth")
    previous_checkpoint = _FileOfRun("outputs/{}_checkpoint_before.pth")
    lock = _FileOfRun("outputs/.{}.lock")
    log = _FileOfRun("outputs/{}.log")
    tensorboard = _FileOfRun("outputs/tensorboard/{}")
    summary = _FileOfRun("summaries/{}_summary.txt")
    plot = _FileOfRun("plots/{}.png")

    def make_folders(self) -> None:
        """Create the three folders and make sure that files can be written into them.

        Raises:
            UsageError: a folder cannot be created or written.
        """
        for folder in (self.metrics.parent, self.summary.parent, self.plot.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
            except OSError as error:
                raise UsageError(f"output_dir: cannot write into {folder}: {error.strerror}") from None

    def remove_partial(self) -> None:
        """Remove what a killed process of this run left half written. Hold the run's lock."""
        for path in (self.params, self.metrics, self.checkpoint, self.summary, self.plot):
            for partial in path.parent.glob(f".{path.name}.*.partial"):
                partial.unlink(missing_ok=True)


def existing_runs(output_dir: str | os.PathLike[str] | None, ending: str) -> list[str]:
    """Names of the runs under ``output_dir`` that have a file ``outputs/NAME<ending>``, sorted."""
    names = (path.name.removesuffix(ending) for path in RunFiles("any", output_dir).metrics.parent.glob(f"*{ending}"))
    return sorted(name for name in names if NAME.fullmatch(name))
