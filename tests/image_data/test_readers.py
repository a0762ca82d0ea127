"""Data sets in every form that they come in, and what is said of those that are not fit."""

import gzip
import shutil
import socket

import numpy as np
import pytest
from conftest import make_tiny_mnist, sums_of, write_idx, write_sums
from PIL import Image

from common.cli import silent
from common.files import UsageError
from data_utils import load_images
from image_data import readers
from image_data.facts import MNIST, DataSet, ensure_data, facts_of, set_folder
from image_data.fetch import DataError
from image_data.readers import read_picture
from imports import datasets, torch

PARTS = {"train": "train", "t10k": "test"}


@pytest.fixture(scope="module")
def digits():
    """Images uint8 [N, 28, 28] and labels of ten classes, 60 to train and 20 to test."""
    draw = np.random.default_rng(0)
    return {part: (draw.integers(0, 256, (n, 28, 28)).astype(np.uint8), np.arange(n) % 10) for part, n in
            (("train", 60), ("t10k", 20))}  # fmt: skip


def write_idx_set(folder, sets, dot="-", packed=False):
    folder.mkdir(parents=True)
    for part, arrays in sets.items():
        for kind, values in zip(("images", "labels"), arrays, strict=True):
            path = folder / f"{part}-{kind}{dot}idx{values.ndim}-ubyte"
            write_idx(path, torch.from_numpy(values.astype(np.uint8)))
            if packed:
                path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
                path.unlink()
    return folder


def write_csv(path, images, labels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    header = ([] if labels is None else ["label"]) + [f"pixel{place}" for place in range(784)]
    rows = images.reshape(len(images), -1)
    rows = rows if labels is None else np.c_[labels, rows]
    np.savetxt(path, rows, "%d", ",", header=",".join(header), comments="")
    return path


def write_folders(folder, sets, names="0123456789"):
    for part, (images, labels) in sets.items():
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            path = folder / PARTS[part] / names[label] / f"{number:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    return folder


def read(source, root, form="whole", log=silent):
    """The four tensors of a set, and what is known of it."""
    folder = ensure_data(str(source), root, form, log)
    return *load_images(folder, True, silent), *load_images(folder, False, silent), facts_of(folder)


def test_the_same_images_in_every_form(digits, tmp_path):
    sources = [
        write_idx_set(tmp_path / "plain", digits),
        write_idx_set(tmp_path / "packed", digits, ".", packed=True),
        write_idx_set(tmp_path / "as_ours" / "MNIST" / "raw", digits).parents[1],
        write_csv(tmp_path / "csv" / "train.csv", *digits["train"]).parent,
        write_csv(tmp_path / "csv_gz" / "train.csv.gz", *digits["train"]).parent,
    ]
    for folder in ("csv/test.csv", "csv_gz/test.csv.gz"):
        write_csv(tmp_path / folder, *digits["t10k"])
    found = [read(source, tmp_path / "data") for source in sources]
    for *tensors, facts in found:
        for mine, theirs in zip(tensors, (*digits["train"], *digits["t10k"]), strict=True):
            assert np.array_equal(mine.numpy(), theirs)
        assert facts.classes == tuple("0123456789")
        assert (facts.train_images, facts.test_images) == (60, 20)
    assert len({facts.sha256 for *_, facts in found}) == 1
    pixels = digits["train"][0] / 255
    expected = round(float(pixels.mean()), 4), round(float(pixels.std()), 4)
    assert {(facts.mean, facts.std) for *_, facts in found} == {expected}
    assert found[0][-1].place == str(tmp_path / "plain")


def test_class_folders(digits, tmp_path):
    *tensors, facts = read(
        write_folders(tmp_path / "set", digits, [f"class {d}" for d in range(10)]), tmp_path / "data"
    )
    assert facts.classes == tuple(f"class {digit}" for digit in range(10))
    order = np.lexsort((np.arange(60), digits["train"][1]))  # a class after the other
    assert np.array_equal(tensors[0].numpy(), digits["train"][0][order])
    assert np.array_equal(tensors[1].numpy(), digits["train"][1][order])


def test_without_test_images_a_sixth_of_each_class_is_held_out(digits, tmp_path):
    shutil.move(write_folders(tmp_path / "set", {"train": digits["train"]}) / "train", tmp_path / "alone")
    lines = []
    _, train, _, test, facts = read(tmp_path / "alone", tmp_path / "data", log=lines.append)
    assert train.bincount().tolist() == [5] * 10
    assert test.bincount().tolist() == [1] * 10
    assert lines == [f"Note: {tmp_path / 'alone'} has no test images: 10, a sixth of each class, are held out."]
    again = read(tmp_path / "alone", tmp_path / "elsewhere")
    assert again[-1].sha256 == facts.sha256


def test_a_test_table_without_labels_is_for_predicting(digits, tmp_path):
    write_csv(tmp_path / "kaggle" / "train.csv", *digits["train"])
    write_csv(tmp_path / "kaggle" / "test.csv", digits["t10k"][0])
    assert read(tmp_path / "kaggle", tmp_path / "data")[-1].test_images == 10


def test_images_of_another_size(tmp_path):
    wide = np.zeros((40, 80), np.uint8)
    wide[10:30, 20:60] = 200
    sets = {part: (np.stack([wide] * 4), np.arange(4) % 2) for part in PARTS}
    source = write_folders(tmp_path / "set", sets, "ab")
    whole = read(source, tmp_path / "data")[0][0]
    assert whole.shape == (28, 28)
    assert whole[14, 14] == 200  # whole, with its proportions: the block is as wide as half of the image ...
    assert (whole[14] > 100).sum() == 14
    assert int(whole[:, 14].sum()) == 7 * 200  # ... and half as high
    as_mnist = read(source, tmp_path / "data", "mnist")[0][0]
    assert (as_mnist[14] > 100).sum() == 20  # its box is 20 pixels wide


def test_what_was_read_is_kept_until_it_changes(digits, tmp_path, monkeypatch):
    source, root = write_folders(tmp_path / "set", digits), tmp_path / "data"
    first = read(source, root)[-1]
    with monkeypatch.context() as patch:
        patch.setattr(readers, "read_source", None)  # it is not read again
        assert read(source, root)[-1] == first
    folder = set_folder(str(source), root, "whole")
    damaged = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert read(source, root)[-1] == first  # made anew
    Image.new("L", (28, 28), 7).save(source / "train" / "3" / "new.png")
    assert read(source, root)[-1].train_images == 61
    shutil.rmtree(source)
    assert read(source, root)[-1].train_images == 61  # what is kept is as good


BAD = {
    "an empty class": (lambda s: (s / "train" / "x").mkdir(), "x is an empty class"),
    "no image": (lambda s: (s / "train" / "3" / "no.png").write_text("no"), "no.png is no image that can be read"),
    "mixed sizes": (lambda s: Image.new("L", (9, 9)).save(s / "train" / "9" / "z.png"), "z.png is 9x9 L, the images"),
    "mixed channels": (lambda s: Image.new("RGB", (28, 28)).save(s / "train" / "9" / "z.png"), "is 28x28 RGB"),
    "a class of the test alone": (lambda s: shutil.copytree(s / "test" / "0", s / "test" / "q"), "have class q"),
    "eleven classes": (lambda s: shutil.copytree(s / "train" / "0", s / "train" / "q"), "has 11 classes; from 2 to 10"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_that_is_not_fit(kind, digits, tmp_path):
    source = write_folders(tmp_path / "set", digits)
    spoil, message = BAD[kind]
    spoil(source)
    with pytest.raises(UsageError, match=message) as caught:
        read(source, tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_one_class_alone(digits, tmp_path):
    images = digits["train"][0]
    with pytest.raises(UsageError, match="has 1 classes; from 2 to 10 are allowed"):
        read(write_csv(tmp_path / "train.csv", images, np.zeros(60, int)), tmp_path / "data")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace("label,", "digit,", 1), "the header of .* is not label,pixel0,...,pixel783"),
        (lambda text: text + "3,4,5\n", "number of columns changed"),
        (lambda text: text.replace("\n1,", "\n1,-", 1), "grey levels outside 0 to 255"),
        (lambda text: text.replace("\n1,", "\n1,x", 1), "could not convert"),
    ],
)
def test_a_table_that_is_not_fit(spoil, message, digits, tmp_path):
    path = write_csv(tmp_path / "train.csv", *digits["train"])
    path.write_text(spoil(path.read_text()))
    with pytest.raises(UsageError, match=message) as caught:
        read(path, tmp_path / "data")
    assert "\n" not in str(caught.value)


def test_idx_files_that_are_not_fit(digits, tmp_path):
    source = write_idx_set(tmp_path / "set", digits)
    labels = source / "train-labels-idx1-ubyte"
    whole = labels.read_bytes()
    for contents, message in ((whole[:-1], "is no IDX file"), (b"", "is no IDX file"), (whole[:7] + b"\x09", "IDX")):
        labels.write_bytes(contents)
        with pytest.raises(UsageError, match=message):
            read(source, tmp_path / "data")
    write_idx(labels, torch.arange(59).to(torch.uint8))
    with pytest.raises(UsageError, match="has 60 images and 59 labels"):
        read(source, tmp_path / "data")
    labels.unlink()
    with pytest.raises(UsageError, match="has no train-labels among its IDX files"):
        read(source, tmp_path / "data")


def test_what_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="gone does not exist; give a folder or file, or one of mnist, fashion"):
        read(tmp_path / "gone", tmp_path / "data")


@pytest.mark.parametrize(("name", "folder"), [("fashion", "FashionMNIST"), ("kmnist", "KMNIST")])
def test_torchvisions_by_name(name, folder, digits, tmp_path):
    """The files lie where torchvision keeps them."""
    write_idx_set(tmp_path / folder / "raw", digits)
    *tensors, facts = read(name, tmp_path)
    assert np.array_equal(tensors[0].numpy(), digits["train"][0])
    assert (facts.name, facts.place, len(facts.classes)) == (name, str(tmp_path), 10)
    assert facts.classes[0] == {"fashion": "T-shirt/top", "kmnist": "o"}[name]


def test_emnist_is_turned_upright(digits, tmp_path):
    names = {"train": "emnist-digits-train", "t10k": "emnist-digits-test"}
    sets = {names[part]: (images.transpose(0, 2, 1), labels) for part, (images, labels) in digits.items()}
    write_idx_set(tmp_path / "EMNIST" / "raw", sets)
    *tensors, facts = read("emnist-digits", tmp_path)
    assert np.array_equal(tensors[0].numpy(), digits["train"][0])
    assert facts.classes == MNIST.classes


@pytest.mark.parametrize("name", ["fashion", "kmnist", "qmnist", "emnist-digits"])
def test_a_set_that_cannot_be_fetched(tmp_path, monkeypatch, name):
    nowhere = "http://127.0.0.1:9/"  # nobody listens there
    for kind in (datasets.FashionMNIST, datasets.KMNIST):
        monkeypatch.setattr(kind, "mirrors", [nowhere])
    monkeypatch.setattr(datasets.EMNIST, "url", f"{nowhere}gzip.zip")
    listed = {
        part: [(nowhere + url.rpartition("/")[2], None) for url, _ in found]
        for part, found in datasets.QMNIST.resources.items()
    }
    monkeypatch.setattr(datasets.QMNIST, "resources", listed)
    with pytest.raises(
        DataError, match=rf"{name} could not be fetched, or is damaged \(.*refused.*\); put .*zip|gz"
    ) as caught:
        read(name, tmp_path)
    assert str(caught.value).endswith("raw")
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None


def test_a_picture_is_read_as_it_will_be_when_it_is_asked(tmp_path):
    """Black ink on nothing, as drawing programs save it: the paper is white, and not black as well."""
    for part in ("train", "test"):
        for number, name in enumerate("aabb"):
            image = Image.new("RGBA", (40, 40))
            image.paste((0, 0, 0, 255), (10 + 5 * number, 5, 14 + 5 * number, 35))
            path = tmp_path / "drawn" / part / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    folder = ensure_data(str(tmp_path / "drawn"), tmp_path / "data", log=silent)
    assert np.array_equal(load_images(folder, True)[0][0], read_picture(str(tmp_path / "drawn/train/a/0.png"), "whole"))


@pytest.mark.parametrize("quote", ["", '"'])
def test_a_table_as_spreadsheets_write_it(digits, tmp_path, quote):
    path = write_csv(tmp_path / "train.csv", *digits["train"])
    first, rest = path.read_text().split("\n", 1)
    names = ",".join(f"{quote}{name.strip()}{quote}" for name in first.split(","))
    path.write_text(f"{names}\n{rest}", encoding="utf-8-sig")
    assert facts_of(ensure_data(str(path), tmp_path / "data", log=silent)).train_images == 50


@pytest.mark.filterwarnings("error")
def test_a_table_without_rows(digits, tmp_path):
    path = write_csv(tmp_path / "train.csv", *digits["train"])
    path.write_text(path.read_text().split("\n", 1)[0])
    with pytest.raises(UsageError, match="has 0 rows"):
        read(path, tmp_path / "data")


def test_sums_beside_idx_files_are_looked_at(tmp_path):
    make_tiny_mnist(tmp_path / "bars")
    write_sums(tmp_path / "bars")
    ensure_data(str(tmp_path / "bars"), tmp_path / "data", log=silent)
    images = tmp_path / "bars" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1] + b"\xaa")
    with pytest.raises(UsageError, match="train-images-idx3-ubyte is damaged"):
        read(tmp_path / "bars", tmp_path / "data")


@pytest.mark.parametrize("form", ["whole", "mnist"])
def test_a_picture_with_nothing_on_it(tmp_path, form):
    for part, name in (("train", "a"), ("train", "b"), ("test", "a")):
        path = tmp_path / "blank" / part / name / "0.png"
        path.parent.mkdir(parents=True)
        Image.new("L", (40, 40), 255).save(path)
    with pytest.raises(UsageError, match=r"one grey level alone|nothing is drawn"):
        ensure_data(str(tmp_path / "blank"), tmp_path / "data", form, silent)


# What is under DATA_DIR/MNIST/raw


@pytest.mark.parametrize(
    "written",
    [
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n").encode("utf-16"),
        lambda text: text.replace("  ", "  ./").encode(),
        lambda text: "".join(line[:64].upper() + line[64:] for line in text.splitlines(keepends=True)).encode(),
    ],
    ids=["byte order mark", "UTF-16", "./", "upper case"],
)
def test_sums_as_other_programs_write_them(written, tiny_mnist):
    raw = tiny_mnist / "MNIST" / "raw"
    (raw / "SHA256SUMS").write_bytes(written((raw / "SHA256SUMS").read_text()))
    assert len(load_images(tiny_mnist, True, silent)[1]) == 300


def test_facts_of_what_was_there_before(tiny_mnist, mnist):
    facts = facts_of(tiny_mnist)
    assert (facts.name, facts.place) == ("tiny", str(tiny_mnist))
    assert (facts.train_images, facts.test_images, facts.mean) == (300, 100, MNIST.mean)
    assert facts.sha256 != MNIST.sha256
    assert facts_of(mnist).sha256 == MNIST.sha256
    assert DataSet.of({}) == MNIST
    assert DataSet.of({"data": facts.as_json()}) == facts


def test_a_set_without_sums_is_left_alone(tiny_mnist):
    raw = tiny_mnist / "MNIST" / "raw"
    before = sums_of(raw)
    (raw / "SHA256SUMS").unlink()
    with pytest.raises(DataError, match="does not hold the original MNIST; for a data set of your own: --dataset"):
        load_images(tiny_mnist, True, silent)
    assert sums_of(raw) == before
    write_sums(raw)
    assert len(read(raw, tiny_mnist)[1]) == 300


def test_the_originals_under_other_names(mnist, tmp_path):
    """3 s: it packs and unpacks them."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    expected = sums_of(mnist / "MNIST" / "raw")
    for number, name in enumerate(expected):
        contents = (mnist / "MNIST" / "raw" / name).read_bytes()
        if number % 2:
            (raw / f"{name}.gz").write_bytes(gzip.compress(contents, 1))
        else:
            (raw / name.replace("-idx", ".idx")).write_bytes(contents)
    assert len(load_images(tmp_path, False, silent)[1]) == 10_000
    assert sums_of(raw) == expected
