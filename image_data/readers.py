"""Data sets of one's own, read: a folder of class folders, a CSV as Kaggle has it, IDX files; and torchvision's."""

import gzip
import os
import socket
import warnings
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

import imports
from common.cli import Log
from common.files import UsageError
from image_data.fetch import CONNECT_SECONDS, DataError, read_sums, sha256_of
from image_data.form import FORMATS, read_grey, to_mnist

MAX_CLASSES = 10
TEST_SHARE = 6  # where there are no test images, every sixth of each class is held out
SPLIT_SEED = 0
SIDE = 28
PIXELS = [f"pixel{place}" for place in range(SIDE * SIDE)]
IDX_FILES = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}  # and their dimensions

Part = tuple[Any, Any]  # images uint8 [N, 28, 28] and their labels, arrays or lists


def _held_out(images: Any, labels: Sequence[Any]) -> tuple[Part, Part]:
    """Training and test part: of each class a sixth of its images, drawn by a seed, at least one, is for the test."""
    names, draw = np.array(labels), np.random.default_rng(SPLIT_SEED)
    chosen = np.zeros(len(names), dtype=bool)
    for name in np.unique(names):
        (places,) = np.nonzero(names == name)
        chosen[draw.permutation(places)[: max(1, len(places) // TEST_SHARE)]] = True
    train, test = ((images[part], names[part].tolist()) for part in (~chosen, chosen))
    return train, test


def read_named(name: str, torchvisions: str, root: Path) -> tuple[list[str], Part, Part]:
    """A set of torchvision's, fetched from its mirrors and verified by its sums; a DataError if that cannot be."""
    options = {"split": "digits"} if name == "emnist-digits" else {}
    make, before = getattr(imports.datasets, torchvisions), socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_SECONDS)  # torchvision would wait for ever
    try:
        sets = [make(str(root), train=train, download=True, **options) for train in (True, False)]
    except (OSError, RuntimeError, ValueError, AssertionError) as error:
        known = [(make.url, "")] if name == "emnist-digits" else make.resources
        urls = known["train"] + known["test"] if isinstance(known, dict) else known
        reason = " ".join(str(getattr(error, "reason", error)).split()) or "an IDX header is wrong"
        raise DataError(
            f"dataset: {name} could not be fetched, or is damaged ({reason}); put"
            f" {', '.join(Path(url).name for url, _ in urls)} into {root / torchvisions / 'raw'}"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    parts = []
    for found in sets:
        images = found.data.transpose(1, 2) if name == "emnist-digits" else found.data  # EMNIST's lie on their side
        labels = found.targets if found.targets.ndim == 1 else found.targets[:, 0]  # QMNIST's have more of each
        parts.append((images.numpy(), labels.numpy()))
    classes = sets[0].classes if name in ("fashion", "kmnist") else list("0123456789")
    return classes, parts[0], parts[1]


def read_source(source: Path, form: str, log: Log) -> tuple[list[str], Part, Part]:
    """A set of one's own: its classes, its training and its test images with labels from 0 on; else a UsageError."""
    train, test = _read(source, form)
    if test is None:
        train, test = _held_out(*train)
        log(f"Note: {source} has no test images: {len(test[1]):,}, a sixth of each class, are held out.")
    found = sorted(set(train[1]), key=lambda label: (int(label) if str(label).isdecimal() else 1 << 60, str(label)))
    if not 2 <= len(found) <= MAX_CLASSES:
        raise UsageError(f"dataset: {source} has {len(found)} classes; from 2 to {MAX_CLASSES} are allowed")
    others = sorted({str(label) for label in set(test[1]) - set(found)})
    if others:
        raise UsageError(f"dataset: {source}: the test images have class {', '.join(others)}, the training images not")
    if not len(test[1]) or train[0].min() == train[0].max():
        raise UsageError(f"dataset: {source} has no test images, or training images of one grey level alone")
    outputs = {label: output for output, label in enumerate(found)}
    train, test = ((images, np.array([outputs[label] for label in labels])) for images, labels in (train, test))
    return [str(label) for label in found], train, test


def _read(source: Path, form: str) -> tuple[Part, Part | None]:
    """The images and labels of a folder or a file, whichever kind it is; None: it has no test images."""
    table = source if source.is_file() else _one_of(source, ("train.csv", "train.csv.gz"))
    if table:
        train = read_csv(table)
        if train[1] is None:
            raise UsageError(f"dataset: {table} has no labels to train on; tools.predict reads it")
        beside = _one_of(source, ("test.csv", "test.csv.gz"))
        test = read_csv(beside) if beside else None
        return train, test if test and test[1] is not None else None
    for folder in (source, source / "MNIST" / "raw"):
        files = {
            part: _one_of(folder, [f"{part}{dot}idx{sides}-ubyte{end}" for dot in "-." for end in ("", ".gz")])
            for part, sides in IDX_FILES.items()
        }
        if any(files.values()):
            missing = [part for part, path in files.items() if path is None]
            if missing:
                raise UsageError(f"dataset: {folder} has no {', '.join(missing)} among its IDX files")
            for name, digest in (read_sums(folder) or {}).items():
                if (folder / name).is_file() and sha256_of(folder / name) != digest:
                    raise UsageError(f"dataset: {folder / name} is damaged: it is not as its SHA-256 says")
            return _idx_part(files, "train", form), _idx_part(files, "t10k", form)
    if (source / "train").is_dir():
        test_folder = source / "test"
        return _pictures(source / "train", form), _pictures(test_folder, form) if test_folder.is_dir() else None
    return _pictures(source, form), None


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _idx(path: Path, dimensions: int) -> Any:
    """The array uint8 of an IDX file of so many dimensions; a UsageError if it is none."""
    try:
        contents = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        shape = np.frombuffer(contents, ">u4", dimensions, offset=4)
        if contents[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"not bytes in {dimensions} dimensions")
        return np.frombuffer(contents, np.uint8, offset=4 + shape.nbytes).reshape(shape)
    except (ValueError, EOFError, zlib.error) as error:
        raise UsageError(f"dataset: {path} is no IDX file: {error}") from None


def _idx_part(files: Mapping[str, Path | None], part: str, form: str) -> Part:
    images, labels = (
        _idx(path, IDX_FILES[name]) for name in (f"{part}-images", f"{part}-labels") if (path := files[name])
    )
    if len(images) != len(labels):
        raise UsageError(f"dataset: {files[f'{part}-images']} has {len(images)} images and {len(labels)} labels")
    if not len(images):
        raise UsageError(f"dataset: {files[f'{part}-images']} has no images")
    return np.stack([_brought(image, form) for image in images]), labels.tolist()


def read_csv(path: Path) -> tuple[Any, Sequence[int] | None]:
    """The images uint8 [N, 28, 28] of a table as Kaggle's Digit Recognizer has it, and their labels if it has any.

    A UsageError if it has another header, rows of another length, or what is no grey level.
    """
    try:
        packed = path.suffix == ".gz"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8-sig") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a table without rows, which is told below
            header = [word.strip(' "\r\n') for word in file.readline().split(",")]
            known = header in (PIXELS, ["label", *PIXELS])
            rows = np.loadtxt(file, np.uint8, delimiter=",", ndmin=2) if known else None
    except (ValueError, OSError, EOFError, zlib.error) as error:  # a level that is no byte, a row of another length
        reason = str(error).partition(";")[0]
        if reason.startswith("could not convert"):
            reason = f"grey levels outside 0 to 255: {reason}"
        raise UsageError(f"dataset: {path}: {reason}") from None
    if rows is None:
        raise UsageError(f"dataset: the header of {path} is not label,pixel0,...,pixel783, or without label")
    if not len(rows) or rows.shape[1] != len(header):
        raise UsageError(f"dataset: {path} has {len(rows)} rows, of another length than its header")
    images = np.ascontiguousarray(rows[:, -len(PIXELS) :]).reshape(-1, SIDE, SIDE)
    return images, rows[:, 0].tolist() if header[0] == "label" else None


def _pictures(folder: Path, form: str) -> Part:
    """The images of a folder that has a folder for each class."""
    images, labels, kinds = [], [], dict[str, str]()
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = [str(inside / name) for name in sorted(os.listdir(inside)) if name != "Thumbs.db" and name[0] != "."]
        if not files:
            raise UsageError(f"dataset: {inside} is an empty class; remove it, or put images into it")
        for path in files:
            try:  # each at once in its small form: thousands of photos would fill the memory
                with Image.open(path) as image:
                    kinds.setdefault(f"{image.width}x{image.height} {image.mode}", path)
                    # what is transparent, how it lies and its colours: as of a picture that is to be predicted
                    coloured = image.mode != "L" and image.format in FORMATS
                    grey = read_grey(path, mixed=form == "mnist") if coloured else np.asarray(image.convert("L"))
                    images.append(_brought(grey, form))
            except Exception as error:  # what a damaged file makes the decoders raise may be anything
                reason = str(error).splitlines()[0]
                raise UsageError(f"dataset: {path} is no image that can be read: {reason}") from None
            if len(kinds) > 1:
                first, other = kinds
                raise UsageError(f"dataset: {path} is {other}, the images before it {first}; all must be alike")
        labels += [inside.name] * len(files)
    if not images:
        raise UsageError(f"dataset: {folder} has neither a folder for each class, nor IDX files, nor a train.csv")
    return np.stack(images), labels


def read_picture(source: bytes | str, form: str) -> NDArray[np.uint8]:
    """A picture as a network takes it, uint8 [28, 28]: whole, or in MNIST's form. Raises as ``image_data.form``."""
    grey = read_grey(source, mixed=form == "mnist")
    return to_mnist(grey) if form == "mnist" else _brought(grey, form)


def _brought(grey: Any, form: str) -> NDArray[np.uint8]:
    """uint8 [28, 28]: an image of that size as it is; another whole with its proportions, or in MNIST's form."""
    levels: NDArray[np.uint8] = np.rint(grey).astype(np.uint8) if grey.dtype != np.uint8 else grey
    if levels.shape == (SIDE, SIDE):
        return levels
    if form == "mnist":
        return to_mnist(levels)
    paper = int(np.median(np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])))
    method = Image.Resampling.BOX if max(levels.shape) > SIDE else Image.Resampling.BICUBIC
    return np.asarray(ImageOps.pad(Image.fromarray(levels), (SIDE, SIDE), method, paper))
