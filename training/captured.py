"""A training step on a GPU as one CUDA graph: recorded once a run, replayed a batch.

A step of these networks is some 500 launches of a few microseconds of work each, so that a GPU waits for Python most of
the time. As a graph they are one launch. What changes from batch to batch, its indices and the learning rate, is memory
on the device that is written between replays.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

from data_utils import Batch, TensorBatches
from image_data.policies import Policy
from imports import nn, torch
from training.machine import first_line
from training.step import Step, StepResult

WARM_UP_STEPS = 3  # before a recording: libraries load, cuDNN searches (pytorch.org/docs/stable/notes/cuda.html)


def record(function: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
    """``function``, which draws from ``generators`` and works on memory that stays where it is, as a CUDA graph.

    Returns what replays it; a RuntimeError if it does what cannot be recorded, such as waiting for the device.
    """
    with torch.cuda.device(generators[0].device):
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        now = torch.cuda.current_stream()
        # a run with a stream of its own is recorded on it, so that graphs that are replayed at the same time do not
        # share a workspace: cuBLAS has one a stream, and a graph keeps that of its recording
        aside = torch.cuda.Stream() if now == torch.cuda.default_stream() else now
        aside.wait_stream(now)
        try:
            with torch.cuda.stream(aside):  # left here if a recording fails: torch.cuda.graph then stays in it (2.14)
                for _ in range(WARM_UP_STEPS):
                    function()
                with torch.cuda.graph(graph, stream=aside):
                    function()
        finally:
            now.wait_stream(aside)
    return graph.replay


def default_generator(device: torch.device) -> torch.Generator:
    """The generator that dropout draws from on ``device``."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        generator: torch.Generator = torch.cuda.default_generators[index]
        return generator
    return torch.default_generator


@dataclass(kw_only=True)
class CapturedStep(Step):
    """Takes a batch by its indices; full batches are replayed, others run as they are.

    Where the step cannot be recorded everything runs as it is, and ``without`` hears why.
    """

    batches: TensorBatches
    without: Callable[[str], None]
    replay: Callable[[], None] | None = field(default=None, init=False)
    tried: bool = field(default=False, init=False)  # to record it, with ``policy``
    policy: Policy | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        self.indices = torch.zeros(self.batches.batch_size, dtype=torch.int64, device=self.device)
        self.rate = torch.zeros((), device=self.device)
        self.totals = torch.zeros(3, device=self.device)

    def inputs(self, batches: Iterable[Batch]) -> Iterator[torch.Tensor]:
        """Indices, a batch at a time; ``batches`` are those that the step was made for."""
        assert batches is self.batches
        return self.batches.order()

    def __call__(self, batch: torch.Tensor, weight: float = 1.0) -> StepResult:
        """Train on the images that ``batch`` names; ``weight`` is 1, since there is one process."""
        groups = self.optimizer.param_groups
        rate = groups[0]["lr"]
        self.rate.fill_(rate)
        for group in groups:  # read from the device, whether replayed or not, so that all steps round alike
            group["lr"] = self.rate
        totals = self._replayed(batch) if len(batch) == len(self.indices) else self._eager(batch)
        for group in groups:
            group["lr"] = rate
        if self.scheduler is not None:
            self.scheduler.step()
        return StepResult(totals, rate)

    def _eager(self, batch: torch.Tensor) -> torch.Tensor:
        return self.compute(*self.batches.take(batch))

    def _replayed(self, batch: torch.Tensor) -> torch.Tensor:
        if not self.tried or self.policy is not self.batches.policy:
            if self.average is not None and not self.average.n_averaged:
                return self._eager(batch)  # the first step of an average copies the weights, the others do not
            self.tried, self.policy = True, self.batches.policy
            self._record()
        if self.replay is None:
            return self._eager(batch)
        self.indices.copy_(batch)
        self.replay()
        return self.totals.clone()

    def _record(self) -> None:
        """Record the step. The steps that warm up leave no trace."""
        assert self.batches.generator is not None
        self.replay = None  # its memory is free for the next
        generators = [self.batches.generator, default_generator(self.device)]
        self._make_momentum()
        changed = list(self._tensors())
        before = [tensor.detach().clone() for tensor in changed]  # a clone that autograd knows ties it to this stream
        drawn = [generator.get_state() for generator in generators]

        def step() -> None:
            self.totals.copy_(self._eager(self.indices))

        try:
            self.replay = record(step, generators)
        except RuntimeError as error:
            self.without(f"the step cannot be recorded: {first_line(error.__context__ or error)}")
            if self.device.type == "cuda":  # a generator whose recording failed may wait for its end for ever
                for generator in generators:
                    generator.graphsafe_set_state(generator.clone_state())
        with torch.no_grad():
            for tensor, value in zip(changed, before, strict=True):
                tensor.copy_(value)
        for generator, state in zip(generators, drawn, strict=True):
            generator.set_state(state)

    def _make_momentum(self) -> None:
        """Give every parameter the momentum that its first step would start from."""
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if group["momentum"] and self.optimizer.state[parameter].get("momentum_buffer") is None:
                    self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    def _tensors(self) -> Iterator[torch.Tensor]:
        """All that a step changes."""
        for module in (self.model, self.average):
            if module is not None:
                yield from chain(module.parameters(), module.buffers())
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))

    def update_average(self) -> None:
        """What ``AveragedModel.update_parameters`` does from the second step on, but for its count of steps: that is on
        the CPU, from where it would be copied, and only tells whether there was a step."""
        average = self.average
        if not self.tried or average is None or average.multi_avg_fn is None:
            return super().update_average()
        pairs = list(zip(_state_of(average.module), _state_of(self.model), strict=True))
        for is_float in (True, False):  # the batches that BatchNorm has counted are whole numbers
            if alike := [pair for pair in pairs if pair[0].is_floating_point() == is_float]:
                averaged, now = zip(*alike, strict=True)
                average.multi_avg_fn(averaged, now, average.n_averaged)
        return None


def _state_of(module: nn.Module) -> Iterator[torch.Tensor]:
    return (tensor.detach() for tensor in chain(module.parameters(), module.buffers()))
