"""Any trained network by its name: a run of the training command, or an ensemble of several.

network = load_network("mnist_model_1")
rows = probabilities(network, images)       # of images in MNIST's form
networks = Networks("results").all()              # every one under a folder, loaded again when its files change
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import silent
from common.files import DamagedFileError, RunFiles, UsageError, existing_runs
from common.results import Metrics, OutputDir, wrong_fields
from data_utils import MEAN, STD, Batch, load_images
from image_data.facts import MNIST, DataSet
from image_data.form import MnistImage
from imports import F, nn, torch
from model_strategy import get_strategy
from tools.file_cache import FileCache
from tools.sureness import Sureness, load_sureness, looked_at, sureness_file
from tools.timing import forward_ms
from tools.voting import METHODS, Ensemble
from training.config import TrainConfig, same_data
from visualization import count_parameters, load_metrics_json, load_model_params

if TYPE_CHECKING:
    import onnxruntime

ENSEMBLE_COMMAND = "python -m tools.ensemble"
ENSEMBLE_SCHEMA = 1
_ENSEMBLE_TYPES: dict[str, Any] = {
    **{"method": str, "temperature": float, "models": list[str], "weights": list[float]},
    **{"accuracy": float, "parameters": int, "members": list[str]},
}
AT_ONCE = 256  # images a network is asked of: what lies between its layers takes memory
NOT_ENSEMBLES = ("_metrics.json", "_evaluation.json", "_export.json")


@dataclass(frozen=True)
class Network:
    """A trained network and what is known of it. ``accuracy`` is of the test images, in percent."""

    name: str
    kind: str  # "network" or "ensemble"
    model: nn.Module
    parameters: int
    accuracy: float | None
    facts: dict[str, Any]  # a run's metrics, or the description of an ensemble
    sureness: Sureness | None = None  # of a calibrated one

    @property
    def data(self) -> DataSet:
        return DataSet.of(self.facts)

    @property
    def temperature(self) -> float:
        """What ``tools.calibrate`` divided its logits by; 1 if it was not calibrated, or was trained since."""
        return 1.0 if self.sureness is None else self.sureness.temperature

    @functools.cached_property
    def latency_ms(self) -> float:
        return round(forward_ms(self.model), 3)

    @functools.cached_property
    def session(self) -> "onnxruntime.InferenceSession":
        """From uint8 [N, 1, 28, 28] to probabilities [N, 10]; of a calibrated one also to bool [N], unsure or not."""
        from tools.onnx_session import onnx_session

        return onnx_session(Deployed(self.model) if self.sureness is None else Doubting(self.model, self.sureness))


def load_network(name: str, output_dir: OutputDir = None, kind: str | None = None, model: str | None = None) -> Network:
    """The trained network of the run ``name``, or the ensemble of that name; ``kind`` says which, if there are both.

    ``model``: which network the run has; None: the one that its metrics name. A UsageError if the name is not allowed,
    there is no such run or ensemble, or its weights are another network's; a DamagedFileError if its files are damaged.
    """
    files = RunFiles(name, output_dir)
    if kind is None:
        kind = "ensemble" if ensemble_file(files).is_file() and not files.metrics.is_file() else "network"
    try:
        if kind == "ensemble":
            facts = read_ensemble(files)
            module: nn.Module = load_ensemble(name, output_dir)
        else:
            facts = load_metrics_json(name, output_dir) if model is None or files.metrics.is_file() else {}
            module = load_run(model or facts["model"], name, output_dir)
    except DamagedFileError:
        raise
    except (FileNotFoundError, RuntimeError) as error:
        raise UsageError(str(error)) from None
    accuracies = [float(facts["accuracy"])] if kind == "ensemble" else facts.get("test_acc")
    accuracy = accuracies[-1] if accuracies else None
    network = Network(name, kind, module, count_parameters(module), accuracy, facts)
    return replace(network, sureness=load_sureness(files, weights_of(network, output_dir)))


def weights_of(network: Network, output_dir: OutputDir) -> Path:
    """The file of its weights; of an ensemble's last member."""
    return RunFiles(network.facts.get("members", [network.name])[-1], output_dir).params


class OnOwnData(nn.Module):
    """A network of other data than MNIST, as the tools ask it: of input that is normalised as MNIST's.

    An output without a class is never the answer.
    """

    def __init__(self, network: nn.Module, data: DataSet) -> None:
        super().__init__()
        self.network, self.data = network, data
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        said = self.network(images * (STD / self.data.std) + (MEAN - self.data.mean) / self.data.std)
        classes = len(self.data.classes)
        return F.pad(F.log_softmax(said[:, :classes], 1), (0, said.shape[1] - classes), value=-100.0)


def images_of(network: Network, train: bool, output_dir: OutputDir, data_dir: Path | None = None) -> Batch:
    """The training or test images uint8 [N, 28, 28] of what ``network`` was trained on, and their labels.

    ``data_dir``: where they are now, or others to take, which is said; None: where the run had them. A UsageError if
    they are no longer there, or have changed.
    """
    facts = network.facts
    if network.kind == "ensemble":  # its members agree; those of the shipped one have weights alone
        member = RunFiles(facts["members"][0], output_dir)
        facts = load_metrics_json(member.name, output_dir) if member.metrics.is_file() else {}
    config = TrainConfig.of(facts)
    if data_dir is not None:
        config = replace(config, data_dir=str(data_dir))
    folder = same_data(config, network.data, f"data_dir: {network.name}", None if data_dir is None else print)
    return load_images(folder, train, silent)


def load_run(model: str, name: str, output_dir: OutputDir = None) -> nn.Module:
    """The registered network ``model`` with the weights of the run ``name``, in evaluation mode.

    A FileNotFoundError if there is no such run, a DamagedFileError if its weights are damaged or no such network is
    registered, a RuntimeError if they are another network's.
    """
    try:
        network = get_strategy(model).build()
    except ValueError as error:  # one that was registered in a script
        raise DamagedFileError(f"{RunFiles(name, output_dir).params} cannot be used here: {error}") from None
    network = load_model_params(network, name, output_dir)
    known = RunFiles(name, output_dir).metrics.is_file()
    data = DataSet.of(load_metrics_json(name, output_dir)) if known else MNIST
    same = (data.mean, data.std, len(data.classes)) == (MEAN, STD, len(MNIST.classes))
    return network if same else OnOwnData(network, data)


def load_ensemble(name: str = "ensemble", output_dir: OutputDir = None) -> Ensemble:
    """The ensemble that ``outputs/NAME.json`` describes, with its members' weights. Raises as ``load_run``."""
    facts = read_ensemble(RunFiles(name, output_dir))
    named = zip(facts["models"], facts["members"], strict=True)
    members = [load_run(model, member, output_dir) for model, member in named]
    return Ensemble(members, facts["method"], facts["weights"], float(facts["temperature"]))


def ensemble_file(files: RunFiles) -> Path:
    return files.metrics.with_name(f"{files.name}.json")


def read_ensemble(files: RunFiles) -> dict[str, Any]:
    """What ``tools.ensemble`` wrote of an ensemble; a FileNotFoundError if there is none of this name, a
    DamagedFileError if it is not what it says."""
    path = ensemble_file(files)
    try:
        facts: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(facts, dict) or facts.get("kind") != "ensemble":
            raise ValueError("it is of another kind")
        if wrong := wrong_fields(facts, _ENSEMBLE_TYPES):
            raise ValueError(f"{', '.join(wrong)} missing or of another type")
        if facts.get("schema") != ENSEMBLE_SCHEMA or facts["method"] not in METHODS:
            raise ValueError(f"schema {facts.get('schema')!r} or method {facts['method']!r} is not known")
        if len({len(facts[key]) for key in ("members", "models", "weights")}) > 1 or not facts["members"]:
            raise ValueError("it has no members, or not as many as models and weights")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; {ENSEMBLE_COMMAND} --name {files.name} makes it") from None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path} is damaged and does not describe an ensemble: {error}") from None
    return facts


def known_ensembles(output_dir: str | None = None) -> list[str]:
    """Names of the files under outputs/ that may describe an ensemble, sorted."""
    names = [name for name in existing_runs(output_dir, ".json") if not f"{name}.json".endswith(NOT_ENSEMBLES)]
    files = [ensemble_file(RunFiles(name, output_dir)) for name in names]
    return [path.stem for path in files if _kinds.get([path], says_ensemble, path)]


def says_ensemble(path: Path) -> bool:
    """Whether the file describes an ensemble, or cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return True  # it may be one that is damaged: whoever loads it will tell
    return isinstance(found, dict) and found.get("kind") == "ensemble"


_kinds: FileCache[bool] = FileCache()  # whether a file describes an ensemble


def known_networks(output_dir: str | None = None) -> list[str]:
    """Names of the ensembles, then of the runs with weights and metrics, but for those that others are fitted by."""
    with_metrics = set(existing_runs(output_dir, "_metrics.json"))
    ensembles = [name for name in known_ensembles(output_dir) if name not in with_metrics]
    voters = tuple(f"{name}_model_" for name in ensembles)
    runs = with_metrics.intersection(existing_runs(output_dir, "_params.pth"))
    twins = {f"{name}_held_out" for name in runs}  # of those that were calibrated
    return ensembles + sorted(name for name in runs - twins if not (name.startswith(voters) and "_seed_" in name))


class Networks:
    """The runs and networks under ``output_dir``, loaded when first asked for, and again when their files change.

    Safe to use from several threads. ``log`` hears of each file that cannot be used, once a change.
    """

    def __init__(self, output_dir: str | None = None, log: Callable[[str], None] = print) -> None:
        self.output_dir, self.log = output_dir, log
        self._loaded: FileCache[Network | None] = FileCache()
        self._read: FileCache[Metrics | str] = FileCache()

    def all(self) -> list[Network]:
        """Every network that can be used."""
        return self.named(known_networks(self.output_dir))

    def named(self, names: Iterable[str]) -> list[Network]:
        """Those of ``names`` that can be used."""
        found = [self._loaded.get(self._files_of(name), self._load, name) for name in names]
        return [network for network in found if network is not None]

    def metrics(self) -> tuple[dict[str, Metrics], list[str]]:
        """The metrics of every run by its name, and a line for each run whose metrics cannot be had."""
        read = {}
        for name in existing_runs(self.output_dir, "_metrics.json"):
            read[name] = self._read.get([RunFiles(name, self.output_dir).metrics], self._read_metrics, name)
        metrics = {name: found for name, found in read.items() if not isinstance(found, str)}
        return metrics, [problem for problem in read.values() if isinstance(problem, str)]

    def _read_metrics(self, name: str) -> Metrics | str:
        try:
            return load_metrics_json(name, self.output_dir)
        except (DamagedFileError, OSError) as error:
            return str(error)

    def _load(self, name: str) -> Network | None:
        try:
            return load_network(name, self.output_dir)
        except (ImportError, OSError, RuntimeError, UsageError) as error:
            self.log(f"{name} is left out: {error}")
            return None

    def _files_of(self, name: str) -> list[Path]:
        """What is changed when other weights are to be loaded. A run that trains rewrites only its metrics."""
        files = RunFiles(name, self.output_dir)
        if files.metrics.is_file():
            return [files.params, sureness_file(files)]
        with contextlib.suppress(FileNotFoundError, DamagedFileError, UsageError):
            members = [RunFiles(member, self.output_dir) for member in read_ensemble(files)["members"]]
            return [ensemble_file(files), sureness_file(files), *(member.params for member in members)]
        return [ensemble_file(files)]


class Deployed(nn.Module):
    """A network (normalised [N, 1, 28, 28] -> log-probabilities [N, 10]) with all that an app would have to do around
    it: uint8 [N, 1, 28, 28] -> probabilities [N, 10]."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        # As large as an image, though one number would do: XNNPACK then refuses an image of another size, where
        # the convolutions and the pooling would take it.
        self.register_buffer("mean", torch.full((1, 1, 28, 28), 255 * MEAN))
        self.register_buffer("std", torch.full((1, 1, 1, 1), 255 * STD))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        log_probabilities: torch.Tensor = self.network((image.float() - self.mean) / self.std)
        return log_probabilities.exp()


class Doubting(Deployed):
    """The same, and whether the network is unsure: uint8 [N, 1, 28, 28] -> probabilities [N, 10], bool [N]."""

    def __init__(self, network: nn.Module, sureness: Sureness) -> None:
        super().__init__(network)
        self.sureness = sureness

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        said, found = looked_at(self.network, (image.float() - self.mean) / self.std)
        return said.exp(), self.sureness(said, found) > self.sureness.threshold


def ask(network: Network, images: Sequence[MnistImage]) -> list[tuple[list[float], bool]]:
    """What ``network`` makes of images in MNIST's form: an image's ten probabilities, and whether it may be no digit.

    A network that is not calibrated takes everything for a digit.
    """
    answers: list[tuple[list[float], bool]] = []
    for first in range(0, len(images), AT_ONCE):
        batch = np.stack(images[first : first + AT_ONCE])[:, None]
        rows, *unsure = (found.tolist() for found in network.session.run(None, {"image": batch}))
        answers += zip(rows, *unsure or [[False] * len(rows)], strict=True)
    return answers


def probabilities(network: Network, images: Sequence[MnistImage]) -> list[list[float]]:
    """The ten probabilities alone, an image a row."""
    return [row for row, _ in ask(network, images)]
