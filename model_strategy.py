"""Which network: one strategy a network, one registry of strategies.

model = ModelContext(get_strategy("3")).get_model(device)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TypeVar

import imports


class ModelStrategy(ABC):
    """Knows how to make one network. A strategy imports its network only when it makes it."""

    @abstractmethod
    def build(self) -> imports.nn.Module:
        """A new network on the CPU: [N, 1, 28, 28] normalised images -> [N, 10] log-probabilities."""

    def get_model(self, device: imports.torch.device | str) -> imports.nn.Module:
        return self.build().to(device)


_REGISTRY: dict[str, type[ModelStrategy]] = {}
_Strategy = TypeVar("_Strategy", bound=type[ModelStrategy])


def register(name: str) -> Callable[[_Strategy], _Strategy]:
    """Class decorator: every command then knows a strategy under ``name``; a ValueError if the name is taken."""

    def add(strategy: _Strategy) -> _Strategy:
        if name in _REGISTRY:
            raise ValueError(f"model {name!r} is registered already, by {_REGISTRY[name].__name__}")
        _REGISTRY[name] = strategy
        return strategy

    return add


def known_models() -> list[str]:
    """The registered names, in the order of their registration."""
    return list(_REGISTRY)


def get_strategy(name: str) -> ModelStrategy:
    """The strategy registered under ``name``; else a ValueError lists the known ones."""
    if name not in _REGISTRY:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(_REGISTRY)}")
    return _REGISTRY[name]()


class ModelContext:
    """Holds the strategy in use and makes its network."""

    def __init__(self, strategy: ModelStrategy) -> None:
        self.strategy = strategy

    def get_model(self, device: imports.torch.device | str) -> imports.nn.Module:
        return self.strategy.get_model(device)


@register("1")
class Model1Strategy(ModelStrategy):
    """Convolutions alone: 7,720 parameters."""

    def build(self) -> imports.nn.Module:
        from models import model_v1

        return model_v1.Net()


@register("2")
class Model2Strategy(ModelStrategy):
    """V1 with a linear layer at the end: 7,730 parameters."""

    def build(self) -> imports.nn.Module:
        from models import model_v2

        return model_v2.Net()


@register("3")
class Model3Strategy(ModelStrategy):
    """One block more, adaptive pooling, a linear layer: 8,650 parameters."""

    def build(self) -> imports.nn.Module:
        from models import model_v3

        return model_v3.Net()
