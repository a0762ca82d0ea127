"""Several runs at once on one GPU, a stream each: a step of one leaves most of the GPU to the others.

results = train_together([TrainConfig(device="cuda", seed=seed, name=f"seed_{seed}") for seed in range(1, 11)])
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from common.cli import Log
from imports import torch
from training.captured import default_generator
from training.config import TrainConfig
from training.machine import resolve_device
from training.report import print_line
from training.run import Run
from training.setup import prepare_run
from training.train import TrainResult, closing, locked


class Turns:
    """A run that takes a step when it is asked to, with a stream and random numbers of its own."""

    def __init__(self, run: Run) -> None:
        self.run, device = run, run.step.device
        generator = default_generator(device)
        self.stream: torch.cuda.Stream | None = None
        self.get: Callable[[], Any] = generator.get_state
        self.set: Callable[[Any], Any] = generator.set_state
        self.drawn: Any = generator.get_state()
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.stream.wait_stream(torch.cuda.current_stream(device))  # what made the run ready is done
            # replays read a state from memory on the device that may belong to it (2.11): a state for each run
            self.get, self.set = generator.graphsafe_get_state, generator.graphsafe_set_state
            self.drawn = generator.clone_state()
        self.steps = run.steps()
        self.under_way = contextlib.ExitStack()  # to be entered; left when the run is done
        self.under_way.enter_context(closing(run))

    def step(self) -> bool:
        """Take a step. Returns whether there was one."""
        self.set(self.drawn)
        with torch.cuda.stream(self.stream):
            went_on = next(self.steps, self) is not self
            if not went_on:
                self.run.save_results()
                self.under_way.close()
        self.drawn = self.get()
        return went_on


def train_together(configs: Sequence[TrainConfig], log: Log = print_line) -> list[TrainResult]:
    """Train the networks of ``configs`` on one device, in turns of a step; each run leaves its own files.

    A run is the same as alone, bit for bit where its configuration is ``deterministic``. Raises as
    ``train_and_evaluate``; the error of one run ends all.
    """
    device = resolve_device(configs[0].device)
    with contextlib.ExitStack() as stack:
        for config in configs:
            stack.enter_context(locked(config.files))
        turns = []
        for config in configs:
            run = prepare_run(config, device, log=log)
            run.report.has_bar = False
            turns.append(Turns(run))
            stack.enter_context(turns[-1].under_way)
        under_way = []
        for turn in turns:
            if turn.step():
                under_way.append(turn)
            if turn.stream is not None:  # the first step makes what all runs read, such as the grids of augmentation
                turn.stream.synchronize()
        while under_way:
            under_way = [turn for turn in under_way if turn.step()]
    return [TrainResult(turn.run.result.eval(), turn.run.metrics, turn.run.config.files) for turn in turns]
