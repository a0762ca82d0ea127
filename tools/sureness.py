"""Whether an image looks to a network like the digit that it answers: told by what its blocks give.

Each block's output is taken as the mean and the standard deviation of its channels; for each digit the training images'
have a mean and a covariance. The score of an image is the negative log-likelihood under the digit answered. Lee et al.
2018, arXiv:1807.03888, with a covariance a class, of all layers at once.
"""

from pathlib import Path

from common.files import DamagedFileError, RunFiles, atomic_write
from common.results import load_tensors
from image_data.fetch import sha256_of
from imports import nn, torch
from models.blocks import ConvBlock

SHRINKAGE = 0.03  # added to the variances, as a share of their mean: pictures of no digit lie where digits never vary
AT_ONCE = 500


def sureness_file(files: RunFiles) -> Path:
    return files.params.with_name(f"{files.name}_sureness.pth")


def looked_at(network: nn.Module, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The log-probabilities [N, 10] of normalised images [N, 1, 28, 28], and what the blocks give [N, D].

    Of an ensemble the blocks of its last member.
    """
    means: list[torch.Tensor] = []
    norms: list[torch.Tensor] = []
    sizes: list[int] = []

    def keep(_: nn.Module, __: object, output: torch.Tensor) -> None:
        means.append(output.mean((2, 3)))
        norms.append(torch.linalg.vector_norm(output, dim=(2, 3)))
        sizes.extend([output[0, 0].numel()] * output.shape[1])

    looked: nn.Module = getattr(network, "members", [network])[-1]
    hooks = [block.register_forward_hook(keep) for block in looked.modules() if isinstance(block, ConvBlock)]
    try:
        said = network(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    mean, square = torch.cat(means, 1), torch.cat(norms, 1).square() / torch.tensor(sizes)  # ONNX has no std()
    return said, torch.cat([mean, (square - mean.square()).clamp_min(0).sqrt()], 1)


class Sureness(nn.Module):
    """Log-probabilities [N, 10] and what the blocks give [N, D] -> scores [N]: how unlike the digit answered the images
    look. Above ``threshold`` they look like none."""

    factors: torch.Tensor  # [10, D, D], whiten what the blocks give for a digit
    centres: torch.Tensor  # [10, D], of the digits
    constants: torch.Tensor  # [10], the log-determinants of their covariances
    threshold: torch.Tensor  # []
    temperature: float = 1.0  # that is in the network's weights already

    def __init__(self, **values: torch.Tensor) -> None:
        super().__init__()
        for name in ("factors", "centres", "constants", "threshold"):
            self.register_buffer(name, values[name].float())

    def forward(self, said: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        digits = said.argmax(1)
        apart = (found - self.centres[digits])[:, None] @ self.factors[digits]
        scores: torch.Tensor = apart.square().sum((1, 2)) + self.constants[digits]
        return scores


def fit(network: nn.Module, inputs: torch.Tensor, labels: torch.Tensor) -> Sureness:
    """Of training images, normalised [N, 1, 28, 28], and their labels; the threshold is still infinite."""
    with torch.inference_mode():
        found = torch.cat([looked_at(network, part)[1] for part in inputs.split(AT_ONCE)]).double()
        spread = found.std(0) + 1e-3
        factors, centres, constants = [], [], []
        for digit in range(10):
            of_digit = found[labels == digit] / spread
            covariance = of_digit.T.cov()
            covariance += SHRINKAGE * covariance.diagonal().mean() * torch.eye(len(covariance))
            values, vectors = torch.linalg.eigh(covariance)
            factors.append((vectors / values.sqrt() / spread[:, None]).half())  # as the file has them
            centres.append((of_digit * spread).mean(0))
            constants.append(values.log().sum())
    fitted = zip(("factors", "centres", "constants"), (factors, centres, constants), strict=True)
    return Sureness(threshold=torch.tensor(torch.inf), **{name: torch.stack(values) for name, values in fitted})


@torch.inference_mode()
def scores(network: nn.Module, sureness: Sureness, inputs: torch.Tensor) -> torch.Tensor:
    """The scores [N] of normalised images [N, 1, 28, 28]: the higher, the less like the digit answered."""
    return torch.cat([sureness(*looked_at(network, part)) for part in inputs.split(AT_ONCE)])


def save_sureness(sureness: Sureness, files: RunFiles, temperatures: dict[str, float]) -> None:
    """Write what was fitted on a network, with the SHA-256 of its weights and the temperature that is in those.

    Of several such weights it is the last layer alone that differs.
    """
    kept = {name: value.half() if name == "factors" else value for name, value in sureness.named_buffers()}
    with atomic_write(sureness_file(files)) as file:
        torch.save(kept | {"temperatures": temperatures}, file)


def load_sureness(files: RunFiles, weights: Path) -> Sureness | None:
    """What ``tools.calibrate`` wrote for these ``weights``; None if it did not. Raises DamagedFileError."""
    path = sureness_file(files)
    if not path.is_file():
        return None
    values = load_tensors(path)
    try:
        sureness, known = Sureness(**values), values["temperatures"].get(sha256_of(weights))
        sureness.temperature = 0.0 if known is None else float(known)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFileError(f"{path} is damaged or of another version: {error!r}") from None
    return None if known is None else sureness
