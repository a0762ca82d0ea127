"""Every setting of a training run: its default, its limits, the help text of its flag.

    config = TrainConfig(model="3", scheduler="onecycle", epochs=15)
    config = TrainConfig.from_sources({"epochs": 5}, config_file="reference")   # flags win over the file
    add_training_flags(parser)                                                  # a flag for each of them

Needs no torch, so that a wrong value is told at once.
"""

from __future__ import annotations

import argparse
import math
import operator
import re
import tomllib
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from common.cli import Log, OneLineParser, silent
from common.files import PROJECT_DIR, DamagedFileError, RunFiles, UsageError
from image_data.facts import MNIST, NAMES, DataSet, ensure_data, facts_of, set_folder
from image_data.policies import POLICIES
from lr_schedulers import SCHEDULERS
from model_strategy import known_models

T = TypeVar("T")

# What a setting decides, and so where it counts: a study searches recipes, a resumed run may be in another place.
GROUPS = {
    "recipe": "what is trained, and how",
    "arithmetic": "how it is computed",
    "machine": "what it runs on",
    "place": "where its files are",
}


def setting(default: T, help: str, group: str = "recipe", **limits: Any) -> T:
    """A field of TrainConfig, of one of the ``GROUPS``.

    ``limits`` are ``minimum`` and ``maximum`` (allowed), ``above`` and ``below`` (not allowed), ``choices``;
    ``flag=False`` keeps it off the command line: a config file sets it.
    """
    return field(default=default, metadata={"help": help, "group": group, **limits})


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run, by default the specification's; a UsageError if one is outside its limits."""

    model: str = setting("1", "which network", choices=known_models)
    epochs: int = setting(10, "passes over the training images", minimum=1, maximum=1_000_000)
    scheduler: str = setting("step", "learning-rate schedule", choices=lambda: list(SCHEDULERS))
    max_lr: float = setting(0.75, "peak learning rate of onecycle", above=0.0)
    lr: float = setting(0.01, "starting learning rate of step", above=0.0)
    batch_size: int = setting(128, "training images a step", minimum=1, maximum=1_000_000)
    seed: int = setting(1, "seed of weights, shuffle, augmentation and dropout", minimum=0, maximum=2**63 - 1)
    # 0: the specification trains on all 60,000. A choice between settings needs a split to be made on.
    val_split: int = setting(0, "training images held out for validation, balanced by class", minimum=0)
    # The same augmentation either way; tensor does it on whole batches and is several times faster.
    pipeline: str = setting("tensor", "how batches are made", choices=lambda: ["tensor", "torchvision"])
    augment: str = setting("rotate", "how training images are changed", choices=lambda: list(POLICIES))
    image_form: str = setting(
        "whole", "images of another size become 28x28 whole, or as MNIST was made", choices=lambda: ["whole", "mnist"]
    )
    init: str | None = setting(None, "weights to start from: the name of a run, or a .pth file")

    # Refinements, for config files; the defaults are the specification's
    pct_start: float = setting(0.3, "part of onecycle that rises", above=0.0, below=1.0, flag=False)
    div_factor: float = setting(7.5, "onecycle starts at max_lr / this", minimum=1.0, flag=False)
    final_div_factor: float = setting(7.5, "onecycle ends at its start / this", minimum=1.0, flag=False)
    momentum: float = setting(0.9, "of SGD", minimum=0.0, below=1.0, flag=False)
    nesterov: bool = setting(False, "Nesterov's momentum", flag=False)
    weight_decay: float = setting(0.0, "of convolutions and linear layers", minimum=0.0, flag=False)
    label_smoothing: float = setting(0.0, "of the loss trained on", minimum=0.0, below=1.0, flag=False)
    dropout: float | None = setting(None, "in place of the network's own", minimum=0.0, below=1.0, flag=False)
    # PyTorch's 0.1 remembers some 20 batches. When the rate is nearly nothing, more of them say more.
    bn_momentum: float | None = setting(None, "in place of BatchNorm's own", above=0.0, maximum=1.0, flag=False)
    augment_strength: float = setting(1.0, "factor of the policy's ranges", minimum=0.0, maximum=10.0, flag=False)
    # What augmentation brings in is not what is to be recognised: the last small steps are for that.
    plain_epochs: int = setting(0, "last epochs on the images as they are", minimum=0, flag=False)
    # 0.998 remembers some 500 steps. What is evaluated and saved is then the average.
    ema_decay: float = setting(0.0, "of the weights' moving average; 0: none", minimum=0.0, below=1.0, flag=False)

    amp: bool = setting(False, "bfloat16 autocast, where the device has bfloat16", "arithmetic")
    deterministic: bool = setting(False, "only GPU algorithms that give the same result every time", "arithmetic")
    kernels: bool = setting(True, "own kernels for the blocks, of C++ or Triton; left out with amp", "arithmetic")
    graph: bool = setting(True, "the fast step on a GPU: all of it as one CUDA graph", "arithmetic")
    compile: bool = setting(False, "torch.compile the step on a GPU: slow to start, faster from then on", "arithmetic")

    device: str = setting("auto", "auto, cpu, cuda, cuda:N or mps; auto is cuda where there is one", "machine")
    threads: int | None = setting(None, "CPU threads; default: torch's choice", "machine", minimum=1, maximum=1024)

    name: str | None = setting(None, "name of the run and its files; default: DATASET_model_MODEL", "place")
    dataset: str = setting("mnist", f"mnist, {', '.join(NAMES)}, or a folder or file of your own", "place")
    data_dir: str | None = setting(None, "folder with MNIST/raw; default: the project's data", "place")
    output_dir: str | None = setting(None, "folder for outputs, plots, summaries; default: the project", "place")
    tensorboard: bool = setting(False, "write outputs/tensorboard/NAME too, for TensorBoard", "place")

    def __post_init__(self) -> None:
        for spec in fields(self):
            value = getattr(self, spec.name)
            if field_type(spec) is float and type(value) is int:  # max_lr = 1 is as good as 1.0
                value = float(value)
            _check(spec, value)
            is_path = spec.name == "data_dir" or (spec.name == "dataset" and value not in (MNIST.name, *NAMES))
            if is_path and value is not None:  # found from another folder too
                value = str(Path(value).absolute())
            object.__setattr__(self, spec.name, value)
        if self.nesterov and not self.momentum:
            raise UsageError("nesterov: True is not allowed with momentum 0.0; it needs one above 0")
        RunFiles(self.run_name)  # checks the name
        if self.pipeline == "torchvision" and self.plain_epochs:
            raise UsageError("plain_epochs: not allowed with --pipeline torchvision; use --pipeline tensor")
        if self.pipeline == "torchvision" and self.augment not in ("none", "rotate"):
            raise UsageError(
                f"augment: {self.augment!r} is not allowed with --pipeline torchvision; choose none or rotate, or"
                " --pipeline tensor"
            )

    @property
    def run_name(self) -> str:
        data = re.sub(r"[^A-Za-z0-9-]+", "_", Path(self.dataset).name.split(".")[0]).strip("_-") or "own"
        return f"{data}_model_{self.model}" if self.name is None else self.name

    @property
    def files(self) -> RunFiles:
        return RunFiles(self.run_name, self.output_dir)

    @property
    def data_root(self) -> Path:
        return PROJECT_DIR / "data" if self.data_dir is None else Path(self.data_dir)

    @property
    def data_folder(self) -> Path:
        """Where the run's MNIST/raw is, or will be after ``ensure_data``."""
        return set_folder(self.dataset, self.data_root, self.image_form)

    def ensure_data(self, log: Log = print) -> Path:
        """``data_folder``, with the run's data there and verified. Raises as ``image_data.facts.ensure_data``."""
        return ensure_data(self.dataset, self.data_root, self.image_form, log)

    @classmethod
    def from_sources(cls, flags: Mapping[str, Any], config_file: str | None = None) -> TrainConfig:
        """A flag that was given wins over the file, as of ``read_config_file``, and the file over the default."""
        settings = {} if config_file is None else read_config_file(config_file)
        return cls(**{**settings, **flags})

    @classmethod
    def of(cls, metrics: Mapping[str, Any], **other: Any) -> TrainConfig:
        """The settings of the run with these ``metrics``, but for what is ``other``; a DamagedFileError if they are of
        another version of this program."""
        try:
            return cls(**metrics.get("config", {}) | other)
        except TypeError as error:
            raise DamagedFileError(f"the metrics of {metrics.get('name')} are of another version: {error}") from None

    def flags_without_effect(self, given: Mapping[str, Any]) -> list[str]:
        """One line for each given flag that changes nothing because of the others."""
        flag, scheduler = ("lr", "step") if self.scheduler == "onecycle" else ("max_lr", "onecycle")
        note = f"--{flag} has no effect with --scheduler {self.scheduler}; it belongs to {scheduler}"
        return [note] if flag in given else []


def same_data(config: TrainConfig, before: DataSet, who: str, note: Log | None = None) -> Path:
    """The folder of ``config``'s data, which ``who`` was trained on when they were ``before``.

    A UsageError if they are not there, or others; with ``note`` that hears of others instead.
    """
    folder = config.data_folder
    if before.sha256 != MNIST.sha256 and config.dataset == MNIST.name and not (folder / "MNIST" / "raw").is_dir():
        raise UsageError(f"{who} is of {before}, and they are not in {folder}; give their --data_dir")
    now = facts_of(config.ensure_data(silent))
    if now.sha256 != before.sha256:
        problem = f"{who} is of {before}, and this is {now}"
        if note is None:
            raise UsageError(f"{problem}; give --data_dir or --dataset of the first")
        note(f"Note: {problem}.")
    return folder


def fields_in(*groups: str) -> tuple[str, ...]:
    return tuple(spec.name for spec in fields(TrainConfig) if spec.metadata["group"] in groups)


def add_training_flags(parser: OneLineParser, leave_out: Collection[str] = ()) -> None:
    """Add a flag for every field of TrainConfig and ``--config``; ``parser`` must suppress what is not given."""
    parser.keys = [spec.name for spec in fields(TrainConfig) if not spec.metadata.get("flag", True)]
    sections = {group: parser.add_argument_group(group, description) for group, description in GROUPS.items()}
    for spec in fields(TrainConfig):
        if spec.name in leave_out or not spec.metadata.get("flag", True):
            continue
        # TrainConfig checks the limits, for flags and files alike; the parser only reads the type
        section, choices = sections[spec.metadata["group"]], spec.metadata.get("choices")
        if field_type(spec) is bool:
            section.add_argument(f"--{spec.name}", action=argparse.BooleanOptionalAction, help=spec.metadata["help"])
            continue
        section.add_argument(
            f"--{spec.name}",
            type=field_type(spec),
            metavar="{" + ",".join(choices()) + "}" if choices else spec.name.upper(),
            help=spec.metadata["help"] + ("" if spec.default is None else f" ({spec.default})"),
        )
    sections["recipe"].add_argument(
        "--config", metavar="NAME|FILE", help="settings from configs/NAME.toml or a TOML file"
    )


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What was given by the flags of ``add_training_flags``, and by the ``--config`` among them; a flag wins."""
    names = {spec.name for spec in fields(TrainConfig)}
    from_file = read_config_file(args.config) if "config" in args else {}
    return from_file | {name: value for name, value in vars(args).items() if name in names}


def field_type(spec: Field[Any]) -> type:
    """The type of a field of TrainConfig, without its None."""
    hint = get_type_hints(TrainConfig)[spec.name]
    plain: type = get_args(hint)[0] if isinstance(hint, types.UnionType) else hint
    return plain


_LIMITS: tuple[tuple[str, Callable[[Any, Any], bool], str], ...] = (
    ("minimum", operator.ge, "at least {}"),
    ("maximum", operator.le, "at most {}"),
    ("below", operator.lt, "below {:g}"),
    ("above", operator.gt, "above {:g}"),
)


def _check(spec: Field[Any], value: Any) -> None:
    limits, name = spec.metadata, spec.name
    if value is None and spec.default is None:
        return
    wanted = field_type(spec)
    if type(value) is not wanted:
        kinds = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
        raise UsageError(f"{name}: {value!r} is not allowed; it must be {kinds[wanted]}")
    if type(value) is float and not math.isfinite(value):
        raise UsageError(f"{name}: {value} is not allowed; it must be finite")
    for limit, holds, words in _LIMITS:
        if limit in limits and not holds(value, limits[limit]):
            raise UsageError(f"{name}: {value} is not allowed; it must be {words.format(limits[limit])}")
    if "choices" in limits and value not in limits["choices"]():
        raise UsageError(f"{name}: {value!r} is not allowed; choose from {', '.join(limits['choices']())}")
    if name == "device" and not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", str(value)):
        raise UsageError(f"device: {value!r} is not allowed; choose from auto, cpu, cuda, cuda:N, mps")


def read_config_file(name_or_path: str) -> dict[str, Any]:
    """The settings in ``configs/NAME.toml`` or in a TOML file; a UsageError if it is none, or a key is no setting."""
    configs = PROJECT_DIR / "configs"
    shipped = configs / f"{name_or_path}.toml"
    path = shipped if re.fullmatch(r"[\w-]+", name_or_path) and shipped.is_file() else Path(name_or_path)
    shipped_names = ", ".join(sorted(p.stem for p in configs.glob("*.toml")))
    settings = read_toml("config", path, f"the path of a TOML file or one of {shipped_names}")
    known = [spec.name for spec in fields(TrainConfig)]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise UsageError(f"config: {name_or_path}: unknown key {', '.join(unknown)}; known: {', '.join(known)}")
    if type(settings.get("model")) is int:  # model = 3 reads as naturally as model = "3"
        settings["model"] = str(settings["model"])
    return settings


def read_toml(flag: str, path: Path, allowed: str) -> dict[str, Any]:
    """What a TOML file holds; a UsageError, which names ``flag`` and what is ``allowed``, if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"{flag}: cannot read {path}: {reason}; give {allowed}") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{flag}: {path} is not valid TOML: {error}") from None
