"""What a run leaves behind, and how to load it again: weights, metrics, summary, plot.

    model = load_model_params(model_v1.Net(), "mnist_model_1")
    metrics = load_metrics_json("mnist_model_1")

Every function finds the project's own folders whatever the current directory is, or takes ``output_dir``.
"""

import contextlib
import copy
import io
import re
from pathlib import Path
from typing import Any, TypeVar

from common.files import RunFiles, UsageError, atomic_write, write_whole
from common.results import (
    Metrics,
    OutputDir,
    load_metrics_json,
    load_tensors,
    no_such_run,
    save_metrics_json,
    save_model_params,
)
from imports import EMA, Figure, MaxNLocator, nn, summary, torch
from model_strategy import get_strategy, known_models

SMOOTHING = 0.02  # the weight of the newest loss in the smoothed curve

Model = TypeVar("Model", bound=nn.Module)


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def load_model_params(model: Model, name: str, output_dir: OutputDir = None) -> Model:
    """Load the weights of the run ``name`` into ``model`` and return it in evaluation mode.

    A FileNotFoundError lists the runs there are. A DamagedFileError: the file is damaged, or a pickle with code in it,
    which is not run. A RuntimeError says of which other network the weights are.
    """
    path = RunFiles(name, output_dir).params
    if not path.exists():
        raise no_such_run(path, output_dir, "_params.pth")
    return load_weights(model, path)


def weights_file(name_or_file: str, output_dir: OutputDir = None) -> Path:
    """The file of a run of this name, or the file itself; a UsageError if there is neither."""
    paths = [Path(name_or_file)]
    with contextlib.suppress(UsageError):  # a path is no name
        paths += [RunFiles(name_or_file, root).params for root in (output_dir, None)]
    for path in paths:
        if path.is_file():
            return path
    raise UsageError(f"init: {name_or_file} is neither a run here nor a file with weights")


def load_weights(model: Model, path: Path) -> Model:
    """Load a file of weights into ``model`` and return it in evaluation mode. Raises as ``load_model_params``."""
    state = load_tensors(path)
    items = state.items() if isinstance(state, dict) else ()
    # without what DistributedDataParallel and torch.compile put before the names
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", str(name)): value for name, value in items}
    shapes = _shapes(state)
    if shapes != _shapes(model.state_dict()):
        fitting = [other for other in known_models() if shapes == _shapes(get_strategy(other).build().state_dict())]
        fits = f"they fit model {' and '.join(fitting)}" if fitting else "they fit none of the registered models"
        raise RuntimeError(f"{path} does not hold weights of {type(model).__module__}.{type(model).__name__}; {fits}")
    model.load_state_dict(state)
    return model.eval()


def _shapes(state: dict[str, Any]) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in state.items() if isinstance(value, torch.Tensor)}


def model_summary(model: nn.Module) -> str:
    """The table that torchsummary prints for ``model`` on an image."""
    # torchsummary runs a forward pass of random numbers, in whatever mode the network is in: on a copy, so
    # that BatchNorm's statistics do not move, and with the random generator put back.
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch.random.fork_rng(devices=[]):
        summary(copy.deepcopy(model).cpu().eval(), (1, 28, 28), device="cpu")
    return printed.getvalue()


def save_model_summary(model: nn.Module, name: str, output_dir: OutputDir = None) -> Path:
    """Write the torchsummary table to ``summaries/NAME_summary.txt`` and return that path."""
    return write_whole(RunFiles(name, output_dir).summary, model_summary(model).encode())


def plot_metrics(metrics: Metrics, name: str, output_dir: OutputDir = None) -> Path:
    """Write the four panels of ``metrics_figure`` to ``plots/NAME.png`` and return that path."""
    path = RunFiles(name, output_dir).plot
    with atomic_write(path) as file:
        metrics_figure(metrics).savefig(file, format="png", dpi=120)
    return path


def metrics_figure(metrics: Metrics) -> Figure:
    """Training loss a batch, test loss, training accuracy and test accuracy an epoch, as four panels."""
    losses, test_losses = metrics["train_losses"], metrics["test_losses"]
    epochs = range(1, len(test_losses) + 1)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    (train_loss, test_loss), (train_acc, test_acc) = figure.subplots(2, 2)

    batches_per_epoch = len(losses) / max(len(test_losses), 1)
    progress = [(batch + 1) / batches_per_epoch for batch in range(len(losses))]
    smoothed = list(map(EMA(SMOOTHING), losses))  # from the first batch on without bias, as in Adam (arXiv:1412.6980)
    train_loss.plot(progress, losses, color="#9ecae1", linewidth=0.6, label="each batch")
    train_loss.plot(progress, smoothed, color="#08519c", linewidth=1.8, label="smoothed")
    train_loss.set(title="Training loss", ylabel="negative log-likelihood", yscale="log")
    train_loss.legend(frameon=False)

    for panel, what in ((test_loss, "losses"), (test_acc, "acc")):
        panel.plot(epochs, metrics[f"test_{what}"], color="#d95f0e", marker="o", markersize=4, label="test")
        if held_out := metrics.get(f"val_{what}"):
            panel.plot(epochs, held_out, color="#756bb1", marker="s", markersize=4, label="validation")
            panel.legend(frameon=False)
    test_loss.set(title="Test loss", ylabel="negative log-likelihood")

    train_acc.plot(epochs, metrics["train_acc"], color="#08519c", marker="o", markersize=4)
    train_acc.set(title="Training accuracy (augmented images, with dropout)", ylabel="accuracy [%]")

    accuracies = metrics["test_acc"]
    test_acc.set(title="Test accuracy", ylabel="accuracy [%]")
    final = "before the first epoch"
    if accuracies:
        final = f"{accuracies[-1]:.2f} % on the test set after {len(accuracies)} epochs"
        above = {"textcoords": "offset points", "xytext": (0, 6), "ha": "center"}
        test_acc.annotate(f"{accuracies[-1]:.2f}", (len(accuracies), accuracies[-1]), **above)
    test_acc.margins(y=0.08)
    for panel in (train_loss, test_loss, train_acc, test_acc):
        panel.set(xlabel="epochs", xlim=(0, len(epochs) + 0.5))
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)

    figure.suptitle(
        f"{metrics['name']} (model {metrics['model']}, {metrics['config']['scheduler']}):"
        f" {metrics['parameters']:,} parameters, {final}",
        fontsize=13,
    )
    return figure
