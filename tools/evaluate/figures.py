"""The pictures of an evaluation."""

from typing import Any

from data_utils import Batch
from imports import Figure, nn, torch
from tools.evaluate.corruptions import corrupt
from tools.evaluate.measures import CLASSES, STRENGTHS, as_input, integrated_gradients, mean_corrupted_accuracy
from tools.intervals import wilson_interval
from tools.output import panels

GALLERY = 60  # mistakes that the gallery shows at most
COLUMNS = 10
BARE = {"frame_on": False, "xticks": (), "yticks": ()}  # a panel with an image alone
DARK, LIGHT, ORANGE = "#08519c", "#9ecae1", "#d95f0e"


def all_figures(evaluation: dict[str, Any], model: nn.Module, test: Batch) -> dict[str, Figure]:
    """Every picture of ``evaluation`` by its name. ``test`` are the images it was made with."""
    return {
        "confusion": confusion_figure(evaluation),
        "mistakes": mistakes_figure(evaluation, test[0]),
        "reliability": reliability_figure(evaluation),
        "robustness": robustness_figure(evaluation, test[0]),
        "saliency": saliency_figure(evaluation, model, test),
    }


def confusion_figure(evaluation: dict[str, Any]) -> Figure:
    """The confusion matrix: mistakes in colour, the right answers on the diagonal left white."""
    counts = torch.tensor(evaluation["confusion"])
    mistakes = counts - counts.diag().diag()
    figure, axes = panels(6, 5.6)
    highest = max(int(mistakes.max()), 1)
    axes.imshow(mistakes, cmap="Oranges", vmin=0, vmax=highest)
    for true, predicted in counts.nonzero().tolist():
        count = int(counts[true, predicted])
        color = "#777777" if true == predicted else "white" if count > 0.6 * highest else "black"
        axes.text(predicted, true, f"{count:,}", ha="center", va="center", color=color, fontsize=9)
    names = evaluation.get("classes", range(CLASSES))
    axes.set(xlabel="predicted", ylabel="true", xticks=range(len(names)), yticks=range(len(names)))
    axes.set(xticklabels=names, yticklabels=names, xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5))
    axes.set_title(f"{evaluation['name']}: {len(evaluation['mistakes'])} mistakes in {evaluation['images']:,} images")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    return figure


def mistakes_figure(evaluation: dict[str, Any], images: torch.Tensor) -> Figure:
    mistakes = evaluation["mistakes"]
    shown = mistakes[:GALLERY]
    rows = max(-(-len(shown) // COLUMNS), 1)
    figure, _ = panels(COLUMNS, 1.14 * rows + 0.5, rows, COLUMNS, subplot_kw=BARE)
    for panel, mistake in zip(figure.axes, shown, strict=False):
        panel.imshow(images[mistake["index"]], cmap="gray_r", interpolation="nearest")
        panel.set_title(_verdict(mistake), fontsize=8)
    which = f"all {len(mistakes)}" if shown == mistakes else f"the {len(shown)} most confident of {len(mistakes)}"
    figure.suptitle(f"{evaluation['name']}: {which} mistakes; true → predicted digit, confidence", fontsize=12)
    return figure


def _verdict(mistake: dict[str, Any]) -> str:
    return f"{mistake['true']} → {mistake['predicted']}  {100 * mistake['confidence']:.1f} %"


def reliability_figure(evaluation: dict[str, Any]) -> Figure:
    """Accuracy against confidence with a 95 % interval, and how many images there are of each confidence."""
    measured = evaluation["calibration"]
    figure, (upper, lower) = panels(6, 6, 2, grid="both", sharex=True, height_ratios=[3, 1])
    upper.plot([0, 100], [0, 100], color="#777777", linewidth=1, linestyle="--", label="perfect calibration")
    series = [(measured["bins"], DARK, "o", f"as it is: ECE {measured['ece']:.2f} %")]
    if measured["bins_scaled"] is not None:
        label = f"at temperature {measured['temperature']:.2f}: ECE {measured['ece_scaled']:.2f} %"
        series.append((measured["bins_scaled"], ORANGE, "s", label))
    for bins, color, marker, label in series:
        confidences, accuracies = torch.tensor([(row["confidence"], row["accuracy"]) for row in bins]).T
        interval = torch.tensor([wilson_interval(row["correct"], row["images"]) for row in bins]).T
        style = {"fmt": marker, "color": color, "capsize": 2, "markersize": 5, "label": label}
        upper.errorbar(confidences, accuracies, yerr=(interval - accuracies).abs(), **style)
    upper.set(ylabel="accuracy [%]", ylim=(-2, 102), title=f"{evaluation['name']}: reliability")
    upper.legend(frameon=False, loc="upper left")
    starts, ends, images = ([row[key] for row in measured["bins"]] for key in ("from", "to", "images"))
    bars = lower.bar(starts, images, width=ends[0] - starts[0], align="edge", color=LIGHT, edgecolor="white")
    lower.bar_label(bars, fmt="{:,.0f}", fontsize=7)
    lower.set(xlabel="confidence [%]", ylabel="images", yscale="log", xlim=(0, 100.5))
    lower.margins(y=0.25)
    return figure


def robustness_figure(evaluation: dict[str, Any], images: torch.Tensor) -> Figure:
    """A panel a corruption: accuracy against its strength, with the first test image at strengths 1, 3 and 5."""
    corruptions = evaluation["corruptions"]
    rows = len(corruptions) // 4
    figure, all_axes = panels(11, 2.3 * rows + 0.5, rows, 4, grid="both", sharex=True, sharey=True)
    for panel, (name, accuracies) in zip(all_axes.flat, corruptions.items(), strict=True):
        panel.plot([0, *STRENGTHS], [evaluation["accuracy"], *accuracies], color=DARK, marker="o", markersize=4)
        panel.set(title=name.replace("_", " "), xticks=(0, *STRENGTHS), xlim=(-0.3, 5.8))
        panel.set(yticks=(0, 50, 100), ylim=(0, 148))
        for strength in (1, 3, 5):
            thumbnail = panel.inset_axes((strength - 0.6, 107, 1.2, 40), transform=panel.transData)
            image = corrupt(images[:1], name, strength)[0]
            thumbnail.imshow(image, cmap="gray", vmin=0, vmax=255, aspect="auto", interpolation="nearest")
            thumbnail.set(xticks=(), yticks=())
    figure.supxlabel("strength (0: the test images as they are)")
    figure.supylabel("accuracy [%]")
    figure.suptitle(
        f"{evaluation['name']}: {len(corruptions)} corruptions at 5 strengths,"
        f" mean accuracy {mean_corrupted_accuracy(corruptions):.1f} %"
    )
    return figure


def saliency_figure(evaluation: dict[str, Any], model: nn.Module, test: Batch) -> Figure:
    """What speaks for the predicted digit and what against it: of each digit the first that is right, and mistakes."""
    images, labels = test[0], test[1].clone()
    verdict = {mistake["index"]: mistake for mistake in evaluation["mistakes"]}
    labels[list(verdict)] = -1
    firsts = [int(index) for digit in range(CLASSES) for index in (labels == digit).nonzero()[:1, 0]]
    groups = [group for group in (firsts, list(verdict)[:COLUMNS]) if group]
    figure, all_axes = panels(COLUMNS, 2.24 * len(groups) + 0.5, 2 * len(groups), COLUMNS, subplot_kw=BARE)
    for number, group in enumerate(groups):
        inputs = as_input(images[group], next(model.parameters()).device)
        with torch.inference_mode():
            digits = model(inputs).argmax(1)
        attributions = integrated_gradients(model, inputs, digits).cpu()
        pairs = all_axes[2 * number : 2 * number + 2, : len(group)].T
        for (above, below), index, digit, attribution in zip(pairs, group, digits.tolist(), attributions, strict=True):
            above.imshow(images[index], cmap="gray_r", interpolation="nearest")
            above.set_title(_verdict(verdict[index]) if index in verdict else f"{digit}", fontsize=8)
            limit = float(attribution.abs().max())
            below.imshow(attribution, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    figure.suptitle(
        f"{evaluation['name']}: integrated gradients; red speaks for the predicted digit, blue against it", fontsize=12
    )
    return figure
