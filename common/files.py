"""Where a run's files are, and how a file is written so that nothing is lost.

files = RunFiles("mnist_model_1")            # under the project
files = RunFiles("trial", "/tmp/results")    # under a folder of your own
write_whole(files.metrics, b"...")
"""

import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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

    Whatever stood under ``path`` stays whole until then, and for good if the block fails; with ``keep`` it gets that
    name. ``durable`` waits until the disk has the bytes and the name, so that they survive a power cut.
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
        if durable and os.name == "posix":  # elsewhere one cannot ask for that
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk does not say by itself which file it was
        raise


def write_whole(path: Path, content: bytes, durable: bool = True) -> Path:
    """Write ``content`` to ``path`` as ``atomic_write`` does, and return ``path``."""
    with atomic_write(path, durable) as file:
        file.write(content)
    return path


class RunFiles:
    """The files of a run under ``output_dir`` (None: the project); a UsageError if its name is no plain file name."""

    def __init__(self, name: str, output_dir: str | os.PathLike[str] | None = None) -> None:
        if not NAME.fullmatch(name):
            raise UsageError(
                f"name: {name!r} is not allowed; a run's name is up to 100 letters, digits, '.', '_' and '-'"
                " and starts with a letter or digit"
            )
        self.name, self.output_dir = name, output_dir
        self.root = PROJECT_DIR if output_dir is None else Path(output_dir)
        self.params = self.root / "outputs" / f"{name}_params.pth"
        self.metrics = self.root / "outputs" / f"{name}_metrics.json"
        self.checkpoint = self.root / "outputs" / f"{name}_checkpoint.pth"
        self.previous_checkpoint = self.root / "outputs" / f"{name}_checkpoint_before.pth"
        self.lock = self.root / "outputs" / f".{name}.lock"
        self.log = self.root / "outputs" / f"{name}.log"
        self.tensorboard = self.root / "outputs" / "tensorboard" / name
        self.summary = self.root / "summaries" / f"{name}_summary.txt"
        self.plot = self.root / "plots" / f"{name}.png"

    def make_folders(self) -> None:
        """Create the three folders and make sure that they can be written into; else a UsageError."""
        for folder in (self.metrics.parent, self.summary.parent, self.plot.parent):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
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
