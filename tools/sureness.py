"""Whether an image looks to a network like the digit that it answers: told by what its blocks give.

Each block's output is taken as the mean and the standard deviation of its channels; for each digit the training images'
have a mean and a covariance. The score of an image is the negative log-likelihood under the digit answered. Lee et al.
2018, arXiv:1807.03888, with a covariance a class, of all layers at once.
"""

from dataclasses import astuple, dataclass, fields
from pathlib import Path

from common.files import DamagedFileError, RunFiles
from common.results import load_tensors
from imports import nn, torch
from models.blocks import ConvBlock

SHRINKAGE = 0.03  # added to the variances, as a share of their mean: pictures of no digit lie where digits never vary
AT_ONCE = 500


def sureness_file(files: RunFiles) -> Path:
    return files.params.with_name(f"{files.name}_sureness.pth")


class Given(nn.Module):
    """Normalised images [N, 1, 28, 28] -> what a network's blocks give [N, D], and its log-probabilities [N, 10].

    Of an ensemble: its last member's.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network: nn.Module = getattr(network, "members", [network])[-1]

    def forward(self, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        found: list[torch.Tensor] = []

        def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
            found.extend((output.mean((2, 3)), output.std((2, 3))))

        hooks = [block.register_forward_hook(keep) for block in self.network.modules() if isinstance(block, ConvBlock)]
        try:
            said = self.network(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.cat(found, 1), said


def features(network: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the blocks of ``network`` give for normalised images [N, 1, 28, 28]: [N, D], and the answers int64 [N]."""
    given = Given(network)
    with torch.inference_mode():
        parts = [given(part) for part in inputs.split(AT_ONCE)]
    return torch.cat([found for found, _ in parts]), torch.cat([said.argmax(1) for _, said in parts])


@dataclass(frozen=True)
class Sureness:
    """``centre`` and ``spread`` [D] standardise the features; ``means`` [10, D]; ``factors`` [10, D, D] whiten them."""

    centre: torch.Tensor
    spread: torch.Tensor
    means: torch.Tensor
    factors: torch.Tensor
    constants: torch.Tensor  # [10]: the log-determinants of the covariances
    threshold: torch.Tensor  # []: above it an image is unsure

    @classmethod
    def fit(cls, network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> "Sureness":
        """Of training images, normalised [N, 1, 28, 28], and their labels; the threshold is still infinite."""
        found = features(network, inputs)[0].double()
        centre, spread = found.mean(0), found.std(0) + 1e-6
        found = (found - centre) / spread
        means, factors, constants = [], [], []
        for digit in range(10):
            of_digit = found[labels == digit]
            covariance = of_digit.T.cov()
            covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance))
            values, vectors = torch.linalg.eigh(covariance)
            means.append(of_digit.mean(0))
            factors.append(vectors / values.sqrt())
            constants.append(values.log().sum())
        kept = [torch.stack(values).float() for values in (means, factors, constants)]
        return cls(centre.float(), spread.float(), kept[0], kept[1], kept[2], torch.tensor(torch.inf))

    def scores(self, network: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """The scores [N] of normalised images [N, 1, 28, 28]: the higher, the less like the digit answered."""
        return self.scores_of(*features(network, inputs))

    def scores_of(self, found: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        """The scores [N] of what the blocks gave [N, D] for images that were answered so [N]."""
        found = (found - self.centre) / self.spread - self.means[answers]
        scores = torch.empty(len(found))
        for digit in answers.unique():
            of_digit = answers == digit
            scores[of_digit] = (found[of_digit] @ self.factors[digit]).square().sum(1) + self.constants[digit]
        return scores

    def as_tensors(self) -> dict[str, torch.Tensor]:
        return dict(zip((field.name for field in fields(self)), astuple(self), strict=True))


def load_sureness(files: RunFiles) -> Sureness | None:
    """What ``tools.calibrate`` wrote for a network; None if it did not. Raises DamagedFileError."""
    path = sureness_file(files)
    if not path.is_file():
        return None
    try:
        return Sureness(**load_tensors(path))
    except TypeError:
        raise DamagedFileError(f"{path} is damaged: it holds other fields than a network's sureness") from None
