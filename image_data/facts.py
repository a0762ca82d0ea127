"""Data sets, by name or of one's own, brought into MNIST's four files once; and what a run knows of its data.

    folder = ensure_data("letters", Path("data"))     # as ensure_mnist gives it
    data = facts_of(folder)                            # name, classes, mean, std, SHA-256, ...

Needs neither NumPy nor torch until a set is read for the first time.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import imports
from common.cli import Log
from common.files import PROJECT_DIR, DamagedFileError, UsageError, write_whole
from image_data.fetch import FACTS_FILE, MNIST_SHA256, ensure_mnist, expected_sums, is_there, write_sums

NAMES = {"fashion": "FashionMNIST", "kmnist": "KMNIST", "qmnist": "QMNIST", "emnist-digits": "EMNIST"}  # torchvision's


@dataclass(frozen=True)
class DataSet:
    """What a run knows of its data; the defaults are MNIST's."""

    name: str = "mnist"
    place: str | None = None  # the folder or file that it was read from, absolute; None: the project's own folder
    classes: tuple[str, ...] = tuple("0123456789")  # in the order of the network's outputs
    mean: float = 0.1307  # of all training pixels, as a fraction of full white
    std: float = 0.3081
    train_images: int = 60_000
    test_images: int = 10_000
    form: str = "mnist"  # how images of another size were brought to 28x28
    # of the images and labels
    sha256: str = hashlib.sha256("".join(MNIST_SHA256.values()).encode()).hexdigest()

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> "DataSet":
        """That of a run, of MNIST before this was recorded; a DamagedFileError if its fields are others."""
        found = metrics.get("data", {})
        try:
            return cls(**{**found, "classes": tuple(found.get("classes", cls.classes))})
        except TypeError as error:
            raise DamagedFileError(f"the metrics' data are not as the schema says: {error}") from None

    def as_json(self) -> dict[str, Any]:
        """What ``of`` takes, in a run's metrics as ``data``."""
        return asdict(self) | {"classes": list(self.classes)}

    def __str__(self) -> str:
        return f"{self.name} ({self.place or 'of the project'}, SHA-256 {self.sha256[:12]})"


MNIST = DataSet()


def set_folder(dataset: str, data_root: Path, form: str) -> Path:
    """Where the four files of a data set are, or will be."""
    if dataset == MNIST.name:
        return data_root
    key = hashlib.sha256(f"{dataset} {form}".encode()).hexdigest()[:8]
    return data_root / "sets" / f"{Path(dataset).name.split('.')[0]}-{key}"


def ensure_data(dataset: str, data_root: Path, form: str = "whole", log: Log = print) -> Path:
    """Make sure that a data set is there in MNIST's form, verified, and return its folder.

    Read is what is not there yet, what has changed since (by names, sizes and times), and what is damaged. A UsageError
    says that there is no such data set or why it is not fit for a training, a DataError that it cannot be fetched.
    """
    folder, source = set_folder(dataset, data_root, form), Path(dataset)
    if dataset == MNIST.name:
        ensure_mnist(folder, log)
        return folder
    raw, named = folder / "MNIST" / "raw", dataset in NAMES
    stamp = dataset if named else _stamp(source)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with imports.FileLock(raw / ".lock"):
            known = _stored_facts(raw)
            if known and stamp in (known["stamp"], None) and is_there(folder):
                return folder
            if stamp is None:
                raise UsageError(
                    f"dataset: {dataset} does not exist; give a folder or file, or one of mnist, {', '.join(NAMES)}"
                )
            from image_data.readers import read_named, read_source

            found = read_named(dataset, NAMES[dataset], data_root) if named else read_source(source, form, log)
            place = str((data_root if named else source).resolve())
            facts = DataSet(dataset if named else source.name.split(".")[0], place, form=form)
            _write(raw, facts, stamp, *found)
    except OSError as error:
        raise UsageError(f"dataset: {error.filename or raw}: {error.strerror or error}") from None
    return folder


def facts_of(folder: Path) -> DataSet:
    """What is known of the data in ``folder``, which are there and verified."""
    raw = folder / "MNIST" / "raw"
    if known := _stored_facts(raw):
        del known["stamp"]
        return DataSet.of({"data": known})
    sums = expected_sums(raw)
    if sums == MNIST_SHA256:
        return replace(MNIST, place=None if folder.resolve() == PROJECT_DIR / "data" else str(folder.resolve()))
    labels = ((raw / f"{part}-labels-idx1-ubyte").read_bytes() for part in ("train", "t10k"))
    train_images, test_images = (int.from_bytes(contents[4:8], "big") for contents in labels)
    name, place = folder.name, str(folder.resolve())
    return DataSet(name, place, train_images=train_images, test_images=test_images, sha256=_of(sums))


def _of(sums: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(sums[name] for name in MNIST_SHA256).encode()).hexdigest()


def _stored_facts(raw: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((raw / FACTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _stamp(source: Path) -> str | None:
    """Names, sizes and times of all files; None: there are none."""
    if not source.exists():
        return None
    walked = os.walk(source, followlinks=True) if source.is_dir() else [(str(source.parent), [], [source.name])]
    files = sorted(os.path.join(folder, name) for folder, _, names in walked for name in names)
    stats = ((path, os.stat(path)) for path in files)
    return hashlib.sha256("".join(f"{path} {at.st_size} {at.st_mtime_ns}\n" for path, at in stats).encode()).hexdigest()


def _write(raw: Path, facts: DataSet, stamp: str, classes: list[str], train: Any, test: Any) -> None:
    import numpy as np

    sums, levels = {}, np.arange(256) / 255
    shares = np.bincount(train[0].reshape(-1), minlength=256) / train[0].size  # of each grey level
    mean = float(shares @ levels)
    for name, values in zip(MNIST_SHA256, (*train, *test), strict=True):
        header = bytes([0, 0, 8, values.ndim]) + b"".join(side.to_bytes(4, "big") for side in values.shape)
        contents = header + values.astype("uint8").tobytes()
        sums[name] = hashlib.sha256(contents).hexdigest()
        write_whole(raw / name, contents)
    facts = replace(
        facts,
        classes=tuple(classes),
        mean=round(mean, 4),
        std=round(float(shares @ (levels - mean) ** 2) ** 0.5, 4),
        train_images=len(train[0]),
        test_images=len(test[0]),
        sha256=_of(sums),
    )
    write_sums(raw, sums)
    write_whole(raw / FACTS_FILE, json.dumps({"stamp": stamp, **facts.as_json()}, indent=1).encode())
