"""The one list of third-party names that the core uses.

    from imports import F, nn, torch

A name is imported when it is first asked for (PEP 562), so that importing this module costs nothing:
``python main.py --help`` answers without loading torch.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker and an editor see, and _SOURCES is read from
    import matplotlib.pyplot as plt
    import torch
    import torch.nn.functional as F
    import torchvision
    from filelock import FileLock, Timeout  # torch itself depends on it, so it is always there
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
    from torch import distributed as dist
    from torch import fx, nn, optim
    from torch.autograd.function import once_differentiable
    from torch.nn.parallel import DistributedDataParallel
    from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, StepLR
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
    from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Subset
    from torchsummary import summary
    from torchvision import datasets, transforms
    from tqdm import tqdm
    from tqdm.std import EMA  # type: ignore[attr-defined]  # the stubs lack it

# name -> (module, attribute of it; None: the module itself), of the imports above
_SOURCES: dict[str, tuple[str, str | None]] = {
    alias.asname or alias.name: (getattr(node, "module", alias.name), alias.name if hasattr(node, "module") else None)
    for block in ast.parse(Path(__file__).read_text(encoding="utf-8")).body
    if isinstance(block, ast.If)
    for node in block.body
    for alias in getattr(node, "names", ())
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _SOURCES[name]
    module = import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value  # the next access finds it without coming here
    return value
