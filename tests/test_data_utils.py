import struct
from pathlib import Path

import pytest
from conftest import make_tiny_mnist, write_idx
from PIL import Image

import data_utils
from common.files import UsageError
from data_utils import TensorBatches, load_data, load_images, normalize, split_indices
from image_data.fetch import DataError
from image_data.policies import POLICIES
from imports import torch, transforms
from training.config import TrainConfig

CPU = torch.device("cpu")
ROTATE = POLICIES["rotate"]


def test_normalize_is_torchvisions_to_the_last_bit():
    grey = torch.arange(256, dtype=torch.uint8).view(16, 16)
    theirs = data_utils.test_transforms()(Image.fromarray(grey.numpy()))
    assert torch.equal(normalize(grey.float()), theirs[0])


def test_specified_transforms():
    train, test = data_utils.train_transforms().transforms, data_utils.test_transforms().transforms
    assert [type(t) for t in train] == [transforms.RandomRotation, transforms.ToTensor, transforms.Normalize]
    assert [type(t) for t in test] == [transforms.ToTensor, transforms.Normalize]
    assert (train[0].degrees, list(train[0].fill)) == ([-7.0, 7.0], [1])
    assert train[0].interpolation is transforms.InterpolationMode.NEAREST
    assert (test[1].mean, test[1].std) == ((0.1307,), (0.3081,))


def settings(data_dir: Path, **others) -> TrainConfig:
    return TrainConfig(batch_size=64, data_dir=str(data_dir), **others)


@pytest.mark.parametrize("val_split", [0, 37])
def test_the_pipelines_make_the_same_test_and_validation_batches(tiny_mnist, val_split):
    ours, theirs = (
        load_data(settings(tiny_mnist, pipeline=pipeline, val_split=val_split), CPU)
        for pipeline in ("tensor", "torchvision")
    )
    pairs = [(ours.test, theirs.test)]
    assert (ours.val is None) == (theirs.val is None) == (val_split == 0)
    if ours.val is not None and theirs.val is not None:
        pairs.append((ours.val, theirs.val))
    for left, right in pairs:
        assert len(left) == len(right)
        for (images, labels), (other_images, other_labels) in zip(left, right, strict=True):
            torch.testing.assert_close(images, other_images)
            assert torch.equal(labels, other_labels)
    assert ours.train_size == theirs.train_size == 300 - val_split
    assert len(ours.train) == len(theirs.train)


def test_the_pipelines_augment_alike(mnist):
    """Not the same draws, but the same distribution: the mean image of many draws, pixel by pixel."""
    images, labels = load_images(mnist, train=True)
    chosen, rounds = images[:20], 300
    batches = TensorBatches(chosen, labels[:20], 20, ROTATE, torch.Generator().manual_seed(0))
    batches_mean = torch.zeros(28, 28)
    for _ in range(rounds):
        batches_mean += next(iter(batches))[0].mean((0, 1)) / rounds
    torch.manual_seed(0)
    transform, pil = data_utils.train_transforms(), [Image.fromarray(image.numpy()) for image in chosen]
    theirs = torch.stack([transform(image) for _ in range(rounds) for image in pil])
    # 6000 draws of pixels whose deviation is about 1
    assert (batches_mean - theirs.mean((0, 1))).abs().max() < 0.06


@pytest.mark.parametrize("pipeline", ["tensor", "torchvision"])
def test_an_epoch_has_every_image_once_in_a_new_order(tiny_mnist, pipeline):
    data = load_data(settings(tiny_mnist, pipeline=pipeline), CPU)
    first, second = ([labels for _, labels in data.train] for _ in range(2))
    assert [len(labels) for labels in first] == [64, 64, 64, 64, 44]
    assert torch.cat(first).bincount().tolist() == [30] * 10
    assert not torch.equal(torch.cat(first), torch.cat(second))


def test_every_image_has_its_own_angle():
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:, 4:24, 13:15] = 255  # one and the same bar
    generator = torch.Generator().manual_seed(0)
    batch, _ = next(iter(TensorBatches(images, torch.zeros(50, dtype=torch.long), 50, ROTATE, generator)))
    assert len({tuple(image.flatten().tolist()) for image in batch}) > 20


@pytest.mark.parametrize("pipeline", ["tensor", "torchvision"])
def test_the_seed_decides(tiny_mnist, pipeline):
    def first_epoch(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)  # torchvision's transforms draw from the global generator
        data = load_data(settings(tiny_mnist, seed=seed, pipeline=pipeline), CPU)
        return torch.cat([images for images, _ in data.train])

    assert torch.equal(first_epoch(5), first_epoch(5))
    assert not torch.equal(first_epoch(5), first_epoch(6))


def test_augmentation_needs_a_generator():
    with pytest.raises(ValueError, match="needs a generator"):
        TensorBatches(torch.zeros(1, 28, 28, dtype=torch.uint8), torch.zeros(1, dtype=torch.long), 1, ROTATE)


def test_batches_share_no_memory_with_the_data_set():
    images = torch.full((4, 28, 28), 200, dtype=torch.uint8)
    for batch, _ in TensorBatches(images, torch.zeros(4, dtype=torch.long), 2):
        batch.zero_()
    assert images.eq(200).all()


def test_split_is_balanced_and_the_same_for_everyone():
    labels = torch.randint(0, 10, (5000,), generator=torch.Generator().manual_seed(0))
    train, val = split_indices(labels, 1003)
    assert sorted([*train.tolist(), *val.tolist()]) == list(range(5000))
    counts = labels[val].bincount(minlength=10)
    assert counts.sum() == 1003
    assert counts.max() - counts.min() <= 1
    torch.manual_seed(99)
    assert torch.equal(split_indices(labels, 1003)[1], val)
    # it is no mere slice of the file
    assert val.max() - val.min() > 4000


def test_split_when_a_class_is_rare():
    labels = torch.tensor([0] * 90 + [1] * 10)
    _, val = split_indices(labels, 50)
    assert labels[val].bincount().tolist() == [40, 10]


def test_split_must_leave_images_to_train_on():
    with pytest.raises(UsageError, match="val_split: 300 is not allowed; there are 300 training images"):
        split_indices(torch.zeros(300, dtype=torch.long), 300)


def test_images_are_the_files_bytes(mnist):
    images, labels = load_images(mnist, train=False)
    raw = mnist / "MNIST" / "raw"
    assert images.dtype == torch.uint8
    assert images.shape == (10_000, 28, 28)
    assert images.numpy().tobytes() == (raw / "t10k-images-idx3-ubyte").read_bytes()[16:]
    assert bytes(labels.tolist()) == (raw / "t10k-labels-idx1-ubyte").read_bytes()[8:]


@pytest.mark.parametrize("damage", ["magic", "short", "swapped", "size", "labels", "count"])
def test_files_that_are_not_in_mnists_format(tmp_path, damage, monkeypatch):
    raw = tmp_path / "MNIST" / "raw"
    make_tiny_mnist(raw)
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    if damage == "magic":
        images.write_bytes(b"\xff" + images.read_bytes()[1:])
    elif damage == "short":
        images.write_bytes(images.read_bytes()[:-1])
    elif damage == "swapped":
        images.write_bytes(labels.read_bytes())
    elif damage == "size":
        write_idx(images, torch.zeros(300, 20, 28, dtype=torch.uint8))
    elif damage == "labels":
        write_idx(labels, torch.full((300,), 10, dtype=torch.uint8))
    elif damage == "count":
        write_idx(labels, torch.zeros(299, dtype=torch.uint8))
    # as if the owner had written the sums of these very files
    monkeypatch.setattr(data_utils, "ensure_mnist", lambda *args: raw)
    with pytest.raises(DataError, match="not in MNIST's format") as caught:
        load_images(tmp_path, train=True)
    assert "\n" not in str(caught.value)


def test_idx_header_of_the_fixture_is_the_originals(tmp_path, mnist):
    make_tiny_mnist(tmp_path / "raw")
    ours = (tmp_path / "raw" / "train-images-idx3-ubyte").read_bytes()[:16]
    original = (mnist / "MNIST" / "raw" / "train-images-idx3-ubyte").read_bytes()[:16]
    assert ours[:4] == original[:4]
    assert struct.unpack(">3I", original[4:]) == (60_000, 28, 28)
    assert struct.unpack(">3I", ours[4:]) == (300, 28, 28)
