"""Which digits are on images: PNG, JPEG or WebP files, drawings or photos, dark on light or light on dark.

python -m tools.predict seven.png
python -m tools.predict scans/*.png --name mnist_model_3
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import OneLineParser, exit_status
from common.files import DamagedFileError, RunFiles, UsageError, existing_runs

if TYPE_CHECKING:
    from image_data.form import MnistImage
    from imports import nn

DEFAULT_RUN = "mnist_model_1"
NOT_ENSEMBLES = ("_metrics.json", "_evaluation.json", "_export.json")
ENSEMBLE_COMMAND = "python -m tools.ensemble"


@dataclass(frozen=True)
class Network:
    """A trained network and what is known of it. ``accuracy`` is of the test images, in percent."""

    name: str
    kind: str  # "network" or "ensemble"
    model: nn.Module
    parameters: int
    accuracy: float | None


def load_network(name: str, output_dir: str | None = None) -> Network:
    """The trained network of the run ``name``, or the ensemble of that name.

    Raises:
        UsageError: the name is not allowed.
        FileNotFoundError: there is no such run or ensemble.
        DamagedFileError, RuntimeError: its files are damaged, or do not belong together.
    """
    from model_strategy import get_strategy
    from visualization import count_parameters, load_metrics_json, load_model_params

    files = RunFiles(name, output_dir)
    if ensemble_file(files).is_file() and not files.metrics.is_file():
        facts = read_ensemble(files)
        model: nn.Module = import_module("tools.ensemble").load_ensemble(name, output_dir)
        return Network(name, "ensemble", model, count_parameters(model), float(facts["accuracy"]))
    metrics = load_metrics_json(name, output_dir)
    try:
        network = get_strategy(metrics["model"]).build()
    except ValueError as error:  # a network that was registered in a script
        raise DamagedFileError(f"{files.params} cannot be used here: {error}") from None
    model = load_model_params(network, name, output_dir)
    accuracies = metrics["test_acc"]
    return Network(name, "network", model, count_parameters(model), accuracies[-1] if accuracies else None)


def ensemble_file(files: RunFiles) -> Path:
    """Where ``tools.ensemble`` writes what it made."""
    return files.metrics.with_name(f"{files.name}.json")


def read_ensemble(files: RunFiles) -> dict[str, Any]:
    """What ``tools.ensemble`` wrote of an ensemble.

    Raises:
        FileNotFoundError: there is none of this name.
        DamagedFileError: it is not what it says.
    """
    path = ensemble_file(files)
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged: {error}") from None
    if not isinstance(facts, dict) or facts.get("kind") != "ensemble":
        raise DamagedFileError(f"{path} does not hold an ensemble")
    kinds: dict[str, Any] = {"accuracy": int | float, "parameters": int, "members": list}
    wrong = [key for key, kind in kinds.items() if not isinstance(facts.get(key), kind)]
    if wrong:
        raise DamagedFileError(f"{path} is not as the schema says: {', '.join(wrong)} missing or of another type")
    return facts


def known_ensembles(output_dir: str | None = None) -> list[str]:
    """Names of the files under outputs/ that may describe an ensemble, sorted."""
    folder = RunFiles("any", output_dir).metrics.parent
    files = [path for path in folder.glob("*.json") if not path.name.endswith(NOT_ENSEMBLES)]
    return sorted(path.stem for path in files if is_a_name(path.stem) and _says_ensemble(path))


def _says_ensemble(path: Path) -> bool:
    stamp = _stamp(path)
    if _kinds.get(path, (None, False))[0] != stamp:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = {"kind": "ensemble"}  # it may be one that is damaged: whoever loads it will tell
        _kinds[path] = stamp, isinstance(found, dict) and found.get("kind") == "ensemble"
    return _kinds[path][1]


_kinds: dict[Path, tuple[tuple[int, int] | None, bool]] = {}  # file -> its stamp, and whether it describes an ensemble


def known_networks(output_dir: str | None = None) -> list[str]:
    """Names of the ensembles, then of the runs that have weights and metrics, but for those trained to vote."""
    with_metrics = set(existing_runs(output_dir, "_metrics.json"))
    ensembles = [name for name in known_ensembles(output_dir) if name not in with_metrics]
    voters = tuple(f"{name}_model_" for name in ensembles)
    runs = [
        name
        for name in existing_runs(output_dir, "_params.pth")
        if name in with_metrics and is_a_name(name) and not name.startswith(voters)
    ]
    return ensembles + runs


def is_a_name(name: str) -> bool:
    """Whether a run may have this name; a file that somebody put into the folder may have any."""
    try:
        RunFiles(name)
    except UsageError:
        return False
    return True


class Networks:
    """The networks under ``output_dir``, loaded when first asked for, and again when their files change.

    Safe to use from several threads. ``log`` hears of each file that cannot be used, once a change.
    """

    def __init__(self, output_dir: str | None = None, log: Callable[[str], None] = print) -> None:
        self.output_dir, self.log = output_dir, log
        self._loaded: dict[str, tuple[Any, Network | None]] = {}
        self._lock = threading.Lock()

    def all(self) -> list[Network]:
        """Every network that can be used."""
        return self.named(known_networks(self.output_dir))

    def named(self, names: Iterable[str]) -> list[Network]:
        """Those of ``names`` that can be used."""
        with self._lock:
            found = [self._get(name) for name in names]
        return [network for network in found if network is not None]

    def _get(self, name: str) -> Network | None:
        stamp = self._stamp_of(name)
        if name not in self._loaded or self._loaded[name][0] != stamp:
            network = None
            try:
                network = load_network(name, self.output_dir)
            except (ImportError, OSError, RuntimeError) as error:
                self.log(f"{name} is left out: {error}")
            self._loaded[name] = (stamp, network)
        return self._loaded[name][1]

    def _stamp_of(self, name: str) -> Any:
        """What is another one when other weights are to be loaded. A run that trains rewrites only its metrics."""
        files = RunFiles(name, self.output_dir)
        if files.metrics.is_file():
            return _stamp(files.params)
        stamps = [_stamp(ensemble_file(files))]
        with contextlib.suppress(FileNotFoundError, DamagedFileError, UsageError):
            members = [str(member) for member in read_ensemble(files)["members"]]
            stamps += [_stamp(RunFiles(member, self.output_dir).params) for member in members]
        return stamps


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def probabilities(network: nn.Module, images: Sequence[MnistImage]) -> list[list[float]]:
    """What ``network`` makes of images in MNIST's form: the ten classes' probabilities, an image a row."""
    import numpy as np

    from data_utils import normalize
    from imports import torch

    batch = normalize(torch.from_numpy(np.stack(images)).unsqueeze(1).float())
    with torch.inference_mode():
        rows: list[list[float]] = network(batch).exp().tolist()
    return rows


def get_args_parser() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = OneLineParser(
        description="Which digits are on images.",
        epilog="An image is a PNG, JPEG or WebP file of one digit, dark on light or light on dark.",
        allow_abbrev=False,
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    parser.add_argument("--name", default=DEFAULT_RUN, help=f"the run or ensemble that answers ({DEFAULT_RUN})")
    parser.add_argument("--output_dir", help="folder with outputs; default: the project")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns its exit status."""
    parser = get_args_parser()
    args = parser.parse_args(argv)
    run = functools.partial(predict_files, args.images, args.name, args.output_dir)
    return exit_status(parser, run, failures=(OSError, RuntimeError))


def predict_files(paths: Sequence[str], name: str, output_dir: str | None) -> int:
    """Print a line a file: the digit, how sure the network is, and the second choice."""
    for path in paths:
        if not Path(path).is_file():
            raise UsageError(f"{path} is no file")
    RunFiles(name, output_dir)  # checks the name before torch is loaded
    from image_data.form import EmptyImageError, ImageError, read_grey, to_mnist

    digits: list[MnistImage | None] = []
    for path in paths:
        try:
            digits.append(to_mnist(read_grey(path)))
        except EmptyImageError:
            digits.append(None)
        except ImageError as error:
            raise UsageError(f"{path}: {error}") from None
    try:
        network = load_network(name, output_dir)
    except FileNotFoundError as error:
        raise UsageError(str(error)) from None
    drawn = [digit for digit in digits if digit is not None]
    answers = iter(probabilities(network.model, drawn) if drawn else [])
    width = max(map(len, [*paths, "image"]))
    print(f"{'image':<{width}}  digit  confidence  second choice")
    for path, digit in zip(paths, digits, strict=True):
        if digit is None:
            print(f"{path:<{width}}  {'-':>5}  nothing is drawn on it")
            continue
        row = next(answers)
        first, second = sorted(range(10), key=lambda digit: -row[digit])[:2]
        print(f"{path:<{width}}  {first:>5}  {row[first]:>10.2%}  {second} at {row[second]:.2%}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
