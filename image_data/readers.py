"""Data sets of one's own, read: a folder of class folders, a CSV as Kaggle has it, IDX files; and torchvision's."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

import imports
from common.files import UsageError
from image_data.fetch import DataError

MAX_CLASSES = 10
TEST_SHARE = 6  # where there are no test images, every sixth of each class is held out
SPLIT_SEED = 0
SIDE = 28
PIXELS = [f"pixel{place}" for place in range(SIDE * SIDE)]
IDX_FILES = {"train-images": 3, "train-labels": 1, "t10k-images": 3, "t10k-labels": 1}  # and their dimensions

Part = tuple[Any, Any]  # images uint8 [N, 28, 28] and their labels, arrays or lists


def _checked(source: Path, train: Part, test: Part) -> tuple[list[str], Part, Part]:
    """The names of the classes, and both parts with labels from 0 on; a UsageError if they are not fit."""
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
    """A set that torchvision knows, fetched from its mirrors and verified by its sums.

    Raises:
        DataError: it is not there and cannot be fetched.
    """
    options = {"split": "digits"} if name == "emnist-digits" else {}
    try:
        make = getattr(imports.datasets, torchvisions)
        sets = [make(str(root), train=train, download=True, **options) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"dataset: {name} could not be fetched ({str(error).splitlines()[0]}); put its files, as torchvision's"
            f" {torchvisions} names them, into {root / torchvisions / 'raw'}"
        ) from None
    parts = []
    for found in sets:
        images = found.data.transpose(1, 2) if name == "emnist-digits" else found.data  # EMNIST's lie on their side
        labels = found.targets if found.targets.ndim == 1 else found.targets[:, 0]  # QMNIST's have more of each
        parts.append((images.numpy(), labels.numpy()))
    classes = sets[0].classes if name in ("fashion", "kmnist") else list("0123456789")
    return classes, parts[0], parts[1]


def read_source(source: Path, form: str, log: Callable[[str], None]) -> tuple[list[str], Part, Part]:
    """A set of one's own: the names of its classes, its training and its test images with labels from 0 on.

    Raises:
        UsageError: it is not fit for a training; one line says why.
    """
    train, test = _read(source, form)
    if test is None:
        train, test = _held_out(*train)
        log(f"Note: {source} has no test images: {len(test[1]):,}, a sixth of each class, are held out.")
    return _checked(source, train, test)


def _read(source: Path, form: str) -> tuple[Part, Part | None]:
    """The images and labels of a folder or a file, whichever kind it is; None: it has no test images."""
    if source.is_file():
        return _labelled(source), None
    tables = {part: _one_of(source, (f"{part}.csv", f"{part}.csv.gz")) for part in ("train", "test")}
    if tables["train"]:
        test = read_csv(tables["test"]) if tables["test"] else None
        return _labelled(tables["train"]), test if test and test[1] is not None else None
    for folder in (source, source / "MNIST" / "raw"):
        files = {part: idx_file(folder, part) for part in IDX_FILES}
        if any(files.values()):
            missing = [part for part, path in files.items() if path is None]
            if missing:
                raise UsageError(f"dataset: {folder} has no {', '.join(missing)} among its IDX files")
            return _idx_part(files, "train", form), _idx_part(files, "t10k", form)
    if (source / "train").is_dir():
        return _pictures(source / "train", form), _pictures(source / "test", form) if (
            source / "test"
        ).is_dir() else None
    return _pictures(source, form), None


def _one_of(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


def idx_file(folder: Path, part: str) -> Path | None:
    """The IDX file of ``part`` (``train-images``) in ``folder``, under either spelling of its name, packed or not."""
    names = [f"{part}{dot}idx{IDX_FILES[part]}-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    return _one_of(folder, names)


def _idx(path: Path, dimensions: int) -> Any:
    """The array uint8 of an IDX file of so many dimensions; a UsageError if it is none."""
    try:
        contents = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        start = 4 + 4 * dimensions
        shape = [int.from_bytes(contents[place : place + 4], "big") for place in range(4, start, 4)]
        if contents[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"not bytes in {dimensions} dimensions")
        return np.frombuffer(contents, np.uint8, offset=start).reshape(shape)
    except (ValueError, EOFError, zlib.error) as error:
        raise UsageError(f"dataset: {path} is no IDX file: {error}") from None


def _idx_part(files: Mapping[str, Path | None], part: str, form: str) -> Part:
    images, labels = (
        _idx(path, IDX_FILES[name]) for name in (f"{part}-images", f"{part}-labels") if (path := files[name])
    )
    if len(images) != len(labels):
        raise UsageError(f"dataset: {files[f'{part}-images']} has {len(images)} images and {len(labels)} labels")
    return _brought([Image.fromarray(image) for image in images], form), labels.tolist()


def read_csv(path: Path) -> tuple[Any, Sequence[int] | None]:
    """The images uint8 [N, 28, 28] of a table as Kaggle's Digit Recognizer has it, and their labels if it has any.

    Raises:
        UsageError: it has another header, rows of another length, or what is no grey level.
    """
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        header = [word.decode(errors="replace").strip() for word in file.readline().split(b",")]
    if header not in (PIXELS, ["label", *PIXELS]):
        raise UsageError(f"dataset: the header of {path} is not label,pixel0,...,pixel783, nor that without label")
    try:
        rows = np.loadtxt(path, np.int64, delimiter=",", skiprows=1, ndmin=2)
    except ValueError as error:
        raise UsageError(f"dataset: {path}: {str(error).splitlines()[0]}") from None
    pixels = rows[:, -len(PIXELS) :]
    if rows.shape[1] != len(header) or pixels.min() < 0 or pixels.max() > 255:
        raise UsageError(f"dataset: {path} has rows of another length, or grey levels outside 0 to 255")
    return pixels.astype(np.uint8).reshape(-1, SIDE, SIDE), rows[:, 0].tolist() if header[0] == "label" else None


def _labelled(path: Path) -> Part:
    images, labels = read_csv(path)
    if labels is None:
        raise UsageError(f"dataset: {path} has no labels to train on; tools.predict reads it")
    return images, labels


def _pictures(folder: Path, form: str) -> Part:
    """The images of a folder that has a folder for each class."""
    images, labels = [], []
    for inside in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        files = sorted(path for path in inside.iterdir() if path.name not in ("Thumbs.db",) and path.name[0] != ".")
        if not files:
            raise UsageError(f"dataset: {inside} is an empty class; remove it, or put images into it")
        for path in files:
            try:
                with Image.open(path) as image:
                    image.load()
            except Exception as error:  # what a damaged file makes the decoders raise may be anything
                raise UsageError(
                    f"dataset: {path} is no image that can be read: {str(error).splitlines()[0]}"
                ) from None
            images.append(image)
            if (image.size, image.mode) != (images[0].size, images[0].mode):
                kinds = [f"{kind.width}x{kind.height} {kind.mode}" for kind in (image, images[0])]
                raise UsageError(f"dataset: {path} is {kinds[0]}, the images before it {kinds[1]}; all must be alike")
        labels += [inside.name] * len(files)
    if not images:
        raise UsageError(f"dataset: {folder} has neither a folder for each class, nor IDX files, nor a train.csv")
    return _brought(images, form), labels


def read_picture(source: bytes | str, form: str) -> NDArray[np.uint8]:
    """A picture as a network takes it, uint8 [28, 28]: whole, or in MNIST's form. Raises as ``image_data.form``."""
    from image_data.form import read_grey, to_mnist

    grey = read_grey(source)
    if form == "mnist":
        return to_mnist(grey)
    image: NDArray[np.uint8] = _brought([Image.fromarray(grey.astype(np.uint8))], form)[0]
    return image


def _brought(images: Sequence[Any], form: str) -> NDArray[np.uint8]:
    """uint8 [N, 28, 28]: images of that size as they are; others whole with their proportions, or in MNIST's form."""

    def brought(image: Any) -> Any:
        grey = image.convert("L")
        if grey.size == (SIDE, SIDE):
            return np.asarray(grey)
        if form == "mnist":
            from image_data.form import to_mnist

            return to_mnist(np.asarray(grey))
        levels = np.asarray(grey)
        paper = int(np.median(np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])))
        resampling = Image.Resampling
        method = resampling.BOX if max(grey.size) > SIDE else resampling.BICUBIC
        return np.asarray(ImageOps.pad(grey, (SIDE, SIDE), method, paper))

    return np.stack([brought(image) for image in images]) if len(images) else np.zeros((0, SIDE, SIDE), np.uint8)
