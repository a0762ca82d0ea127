"""MNIST as augmented, normalised batches.

    data = load_data(TrainConfig(batch_size=128, seed=1), torch.device("cpu"))
    for images, labels in data.train:      # float32 [128, 1, 28, 28], int64 [128]
        ...

Two pipelines make the same batches. ``torchvision`` is the specification's: PIL images through transforms, one
by one. ``tensor`` keeps the whole set as one uint8 tensor on the device and works on whole batches.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import imports  # torchvision is loaded by what asks for it
from common.cli import Log
from common.files import UsageError
from image_data.augmentation import FILL, augment
from image_data.facts import MNIST, DataSet, facts_of
from image_data.fetch import DataError, ensure_mnist
from image_data.policies import POLICIES, Policy, get_policy
from imports import BatchSampler, DataLoader, F, RandomSampler, Subset, torch

MEAN, STD = MNIST.mean, MNIST.std
EVAL_BATCH_SIZE = 1000
# Every run holds out the same images, whatever its seed, so that runs can be compared and combined on them.
SPLIT_SEED = 0

Batch = tuple[torch.Tensor, torch.Tensor]


def normalize(images: torch.Tensor, mean: float = MEAN, std: float = STD) -> torch.Tensor:
    """Grey levels 0-255 (float) -> the networks' input, in place; ToTensor and Normalize to the last bit."""
    return images.div_(255).sub_(mean).div_(std)


@dataclass(eq=False)
class TensorBatches:
    """All images on the device, augmented and normalised a batch at a time."""

    images: torch.Tensor  # uint8 [N, 28, 28]
    labels: torch.Tensor  # int64 [N]
    batch_size: int
    policy: Policy | None = None  # of the augmentation, if any
    generator: torch.Generator | None = None  # draws the order and the augmentation; None: the order as it is
    # (rank, count) of the process that gets its part of every batch. The draws are for whole batches, the same in
    # every process: together the parts are what one process would see.
    share: tuple[int, int] = (0, 1)
    facts: DataSet = MNIST  # whose mean and standard deviation normalise the images

    def __post_init__(self) -> None:
        if self.policy is not None and self.generator is None:
            raise ValueError("augmentation needs a generator")

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.take, self.order())

    def order(self) -> Iterator[torch.Tensor]:
        """The batches of an epoch as indices: int64 on the device, newly shuffled if there is a generator."""
        device, n = self.images.device, len(self.labels)
        if self.generator is None:
            order = torch.arange(n, device=device)
        else:
            order = torch.randperm(n, generator=self.generator, device=device)
        yield from order.split(self.batch_size)

    def take(self, chosen: torch.Tensor) -> Batch:
        """The images and labels of a batch of ``order``, augmented and normalised."""
        mine = self._part(chosen)
        images = self.images[mine].unsqueeze(1).float()
        if self.policy is not None:
            draws = torch.rand(len(chosen), self.policy.draws, generator=self.generator, device=images.device)
            images = augment(images, self.policy, self._part(draws))
        return normalize(images, self.facts.mean, self.facts.std), self.labels[mine]

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        rank, processes = self.share
        return whole.tensor_split(processes)[rank]


Batches = TensorBatches | DataLoader[Batch]


@dataclass
class Data:
    """The batches of one run. ``generator`` draws the shuffle, and the augmentation of the tensor pipeline."""

    train: Batches
    val: Batches | None
    test: Batches | None
    facts: DataSet
    train_size: int  # images
    generator: torch.Generator


class PartOfEachBatch(BatchSampler):
    """Shuffled batches for a DataLoader, of each the part that this process gets."""

    def __init__(self, size: int, batch_size: int, generator: torch.Generator, share: tuple[int, int] = (0, 1)) -> None:
        super().__init__(RandomSampler(range(size), generator=generator), batch_size, drop_last=False)
        self.rank, self.processes = share

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield torch.tensor(batch).tensor_split(self.processes)[self.rank].tolist()


def train_transforms(policy: Policy = POLICIES["rotate"], facts: DataSet = MNIST) -> "imports.transforms.Compose":
    """The training transforms for PIL images, of the policies that this pipeline knows: rotate and none."""
    if policy.draws == 0:
        return test_transforms(facts)
    rotation = imports.transforms.RandomRotation((-policy.rotation, policy.rotation), fill=(FILL,))
    return imports.transforms.Compose([rotation, *test_transforms(facts).transforms])


def test_transforms(facts: DataSet = MNIST) -> "imports.transforms.Compose":  # noqa: PT028  # no test
    """The specification's test transforms, for PIL images: no augmentation."""
    of = imports.transforms
    return of.Compose([of.ToTensor(), of.Normalize((facts.mean,), (facts.std,))])


def split_indices(labels: torch.Tensor, val_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ascending indices of the training images and of ``val_size`` for validation, as equally many a class as may be.

    They depend on the labels and ``SPLIT_SEED`` alone. A UsageError if no training image would be left.
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


def load_images(data_dir: str | os.PathLike[str], train: bool, log: Log = print) -> Batch:
    """The verified images uint8 [N, 28, 28] and labels int64 [N] of the training or the test set; else a DataError."""
    ensure_mnist(data_dir, log)
    return _read_images(data_dir, train)


def _read_images(data_dir: str | os.PathLike[str], train: bool) -> Batch:
    try:
        mnist = imports.datasets.MNIST(str(data_dir), train=train)
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
    settings: Any, device: torch.device, log: Log = print, share: tuple[int, int] = (0, 1), with_test: bool = True
) -> Data:
    """The training, validation and test batches of a run with the ``settings`` of a ``TrainConfig``.

    Of several processes each gets its ``share`` of every batch, (rank, count). ``with_test`` False: the test images are
    not read, and ``Data.test`` is None. Raises as ``load_images`` and ``split_indices``.
    """
    folder = settings.ensure_data(log)
    facts, tensors = facts_of(folder), settings.pipeline == "tensor"
    images, labels = _read_images(folder, train=True)
    train_idx, val_idx = split_indices(labels, settings.val_split)
    generator = torch.Generator(device if tensors else "cpu").manual_seed(settings.seed)
    policy = get_policy(settings.augment, settings.augment_strength)
    train: Batches
    if tensors:
        images, labels = images[train_idx].to(device), labels[train_idx].to(device)
        train = TensorBatches(images, labels, settings.batch_size, policy, generator, share, facts)
    else:
        whole = imports.datasets.MNIST(str(folder), True, train_transforms(policy, facts))
        augmented = Subset(whole, train_idx.tolist())
        sampler = PartOfEachBatch(len(train_idx), settings.batch_size, generator, share)
        train = DataLoader(augmented, batch_sampler=sampler, generator=generator)

    def in_order(of_train: bool, chosen: torch.Tensor | slice = slice(None)) -> Batches:
        images, labels = _read_images(folder, of_train)
        if tensors:
            images, labels = images[chosen].to(device), labels[chosen].to(device)
            return TensorBatches(images, labels, EVAL_BATCH_SIZE, share=share, facts=facts)
        mine = torch.arange(len(labels))[chosen][share[0] :: share[1]]
        part = Subset(imports.datasets.MNIST(str(folder), of_train, test_transforms(facts)), mine.tolist())
        # A DataLoader draws a seed at every pass; from a generator of its own, so that how often a network is evaluated
        # does not change the dropout of the epochs to come.
        return DataLoader(part, EVAL_BATCH_SIZE, generator=torch.Generator())

    val = in_order(True, val_idx) if settings.val_split else None
    test = in_order(False) if with_test else None
    return Data(train, val, test, facts, len(train_idx), generator)
