"""MNIST as augmented, normalised batches.

    data = load_data("data", batch_size=128, device=torch.device("cpu"), seed=1)
    for images, labels in data.train:      # float32 [128, 1, 28, 28], int64 [128]
        ...

Two pipelines make the same batches. ``torchvision`` is the specification's: PIL images through transforms, one
by one. ``tensor`` keeps the whole set as one uint8 tensor on the device and works on whole batches.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from file_utils import UsageError
from imports import BatchSampler, DataLoader, F, RandomSampler, Subset, datasets, torch, transforms
from mnist_files import DataError, ensure_mnist

MEAN, STD = 0.1307, 0.3081  # of all training pixels, as fractions of full white
MAX_ROTATION = 7.0  # degrees, either way
FILL = 1  # grey level (of 255) of what a rotation brings in from outside: the specification's fill=(1,)
EVAL_BATCH_SIZE = 1000
# Every run holds out the same images, whatever its seed, so that runs can be compared and combined on them.
SPLIT_SEED = 0

Batch = tuple[torch.Tensor, torch.Tensor]


class Batches(Protocol):
    """What the loop needs of a loader: its length in batches, and batches of (images, labels)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Batch]: ...


@dataclass
class Data:
    """The batches of one run. ``generator`` draws the shuffle, and the augmentation of the tensor pipeline."""

    train: Batches
    val: Batches | None
    test: Batches
    train_size: int  # images
    generator: torch.Generator


def normalize(images: torch.Tensor) -> torch.Tensor:
    """Grey levels 0-255 (float) -> the networks' input, in place; ToTensor and Normalize to the last bit."""
    return images.div_(255).sub_(MEAN).div_(STD)


@functools.cache
def _pixel_centres(height: int, width: int, device: torch.device) -> torch.Tensor:
    """[2, H * W]: x and y of every pixel's centre, from -1 to 1 between the image's edges, as grid_sample counts."""
    y, x = (torch.arange(size, device=device) * (2 / size) + (1 / size - 1) for size in (height, width))
    return torch.stack([x.repeat(height), y.repeat_interleave(width)])


def rotate(images: torch.Tensor, degrees: torch.Tensor, fill: float = FILL) -> torch.Tensor:
    """Rotate each image about its centre, counter-clockwise, taking the nearest pixel.

    The same as torchvision's ``RandomRotation`` on PIL images (nearest is its default), but for pixels whose
    source lies on the border of two cells, where rounding decides.

    Args:
        images: float [N, 1, H, W].
        degrees: [N].
        fill: the value of pixels whose source lies outside.
    """
    radians = degrees * (math.pi / 180)
    cos, sin = radians.cos(), radians.sin()
    # where an output pixel takes its value from: the inverse rotation, y downwards
    matrix = torch.stack([cos, -sin, sin, cos], dim=1).view(-1, 2)
    height, width = images.shape[-2:]
    grid = (matrix @ _pixel_centres(height, width, images.device)).view(-1, 2, height, width).permute(0, 2, 3, 1)
    # grid_sample can only fill with zeros
    sampled = F.grid_sample(images - fill, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled.add_(fill)


class TensorBatches:
    """All images on the device, augmented and normalised a batch at a time.

    Args:
        images: uint8 [N, 28, 28].
        labels: int64 [N].
        max_rotation: degrees; each image is rotated by its own uniform draw from +-max_rotation. 0: none.
        generator: draws the order and the rotations; None: the given order, no rotation.
        share: (rank, count) of the process that gets its part of every batch. The draws are for whole batches,
            the same in every process: together the parts are what one process would see.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        batch_size: int,
        max_rotation: float = 0.0,
        generator: torch.Generator | None = None,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if max_rotation and generator is None:
            raise ValueError("a random rotation needs a generator")
        self.images, self.labels = images, labels
        self.batch_size, self.max_rotation, self.generator = batch_size, max_rotation, generator
        self.rank, self.processes = share

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        device, n = self.images.device, len(self.labels)
        if self.generator is None:
            order = torch.arange(n, device=device)
        else:
            order = torch.randperm(n, generator=self.generator, device=device)
        for chosen in order.split(self.batch_size):
            mine = self._part(chosen)
            images = self.images[mine].unsqueeze(1).float()
            if self.max_rotation:
                draws = torch.rand(len(chosen), generator=self.generator, device=device)
                images = rotate(images, (2 * self._part(draws) - 1) * self.max_rotation)
            yield normalize(images), self.labels[mine]

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.tensor_split(self.processes)[self.rank]


class PartOfEachBatch:
    """A batch sampler for a DataLoader: shuffled batches, of each the part that this process gets."""

    def __init__(self, size: int, batch_size: int, generator: torch.Generator, share: tuple[int, int] = (0, 1)) -> None:
        order = RandomSampler(range(size), generator=generator)
        self.whole, self.share = BatchSampler(order, batch_size, drop_last=False), share

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator[list[int]]:
        rank, processes = self.share
        for batch in self.whole:
            yield torch.tensor(batch).tensor_split(processes)[rank].tolist()


def train_transforms() -> transforms.Compose:
    """The specification's training transforms, for PIL images."""
    rotation = transforms.RandomRotation((-MAX_ROTATION, MAX_ROTATION), fill=(FILL,))
    return transforms.Compose([rotation, *test_transforms().transforms])


def test_transforms() -> transforms.Compose:
    """The specification's test transforms, for PIL images: no augmentation."""
    return transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])


def split_indices(labels: torch.Tensor, val_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose ``val_size`` images for validation, the same number of every class (as nearly as that divides).

    The choice depends on the labels and ``SPLIT_SEED`` alone.

    Returns:
        Ascending indices of the training images and of the validation images.

    Raises:
        UsageError: no training image would be left.
    """
    n = len(labels)
    if val_size >= n:
        raise UsageError(f"val_split: {val_size} is not allowed; there are {n} training images, hold out fewer")
    shuffled = torch.randperm(n, generator=torch.Generator().manual_seed(SPLIT_SEED))
    # an image's rank among those of its class; all images of rank 0 come first, then all of rank 1, ...
    one_hot = F.one_hot(labels[shuffled])
    rank = one_hot.cumsum(0).gather(1, labels[shuffled].unsqueeze(1)).squeeze(1)
    by_rank = shuffled[rank.argsort(stable=True)]
    return by_rank[val_size:].sort().values, by_rank[:val_size].sort().values


def load_images(
    data_dir: str | os.PathLike[str], train: bool, log: Callable[[str], None] = print
) -> tuple[torch.Tensor, torch.Tensor]:
    """The verified images uint8 [N, 28, 28] and labels int64 [N] of the training or the test set.

    Raises:
        DataError: they are not there and cannot be fetched, or are not in MNIST's format.
    """
    ensure_mnist(data_dir, log)
    return _read_images(data_dir, train)


def _read_images(data_dir: str | os.PathLike[str], train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    try:
        mnist = datasets.MNIST(str(data_dir), train=train)
        images, labels = mnist.data, mnist.targets
        if images.dtype != torch.uint8 or images.shape[1:] != (28, 28) or len(images) == 0:
            raise ValueError(f"the images are {images.dtype} {list(images.shape)}, not uint8 [N, 28, 28]")
        if labels.shape != images.shape[:1] or labels.min() < 0 or labels.max() > 9:
            raise ValueError("there must be one label from 0 to 9 an image")
    except (ValueError, AssertionError, RuntimeError, IndexError, KeyError, TypeError) as error:
        # torchvision checks an IDX header by assertions without a message
        detail = str(error) or "an IDX header or length is wrong"
        raise DataError(f"{data_dir}/MNIST/raw is not in MNIST's format: {detail}") from None
    return images, labels.long()


def load_data(
    data_dir: str | os.PathLike[str],
    batch_size: int,
    device: torch.device,
    seed: int,
    pipeline: str = "tensor",
    val_split: int = 0,
    log: Callable[[str], None] = print,
    share: tuple[int, int] = (0, 1),
) -> Data:
    """The training, validation and test batches of one run, or a process's part of each of them.

    Args:
        batch_size: of the training batches; the last one of an epoch may be smaller.
        pipeline: ``tensor`` or ``torchvision``.
        val_split: training images held out; 0: none, and ``Data.val`` is None.
        share: (rank, count) of the process, if there are several.

    Raises:
        DataError, UsageError: as ``load_images`` and ``split_indices``.
    """
    ensure_mnist(data_dir, log)
    images, labels = _read_images(data_dir, train=True)
    test_images, test_labels = _read_images(data_dir, train=False)
    train_idx, val_idx = split_indices(labels, val_split)

    if pipeline == "torchvision":
        generator = torch.Generator().manual_seed(seed)
        plain = {"transform": test_transforms()}
        augmented = datasets.MNIST(str(data_dir), train=True, transform=train_transforms())
        held_out = Subset(datasets.MNIST(str(data_dir), train=True, **plain), val_idx.tolist())
        test = datasets.MNIST(str(data_dir), train=False, **plain)
        sampler = PartOfEachBatch(len(train_idx), batch_size, generator, share)
        return Data(
            train=DataLoader(Subset(augmented, train_idx.tolist()), batch_sampler=sampler, generator=generator),
            val=DataLoader(_part_of(held_out, share), EVAL_BATCH_SIZE) if val_split else None,
            test=DataLoader(_part_of(test, share), EVAL_BATCH_SIZE),
            train_size=len(train_idx),
            generator=generator,
        )

    generator = torch.Generator(device).manual_seed(seed)
    images, labels = images.to(device), labels.to(device)
    test_images, test_labels = test_images.to(device), test_labels.to(device)
    return Data(
        train=TensorBatches(images[train_idx], labels[train_idx], batch_size, MAX_ROTATION, generator, share),
        val=TensorBatches(images[val_idx], labels[val_idx], EVAL_BATCH_SIZE, share=share) if val_split else None,
        test=TensorBatches(test_images, test_labels, EVAL_BATCH_SIZE, share=share),
        train_size=len(train_idx),
        generator=generator,
    )


def _part_of(dataset: datasets.MNIST | Subset[Batch], share: tuple[int, int]) -> Subset[Batch]:
    rank, processes = share
    return Subset(dataset, range(rank, len(dataset), processes))
