"""Training by several processes, as ``torchrun`` starts them: one machine or many, gloo on CPUs, NCCL on GPUs.

    torchrun --standalone --nproc-per-node=2 main.py --model 3 --scheduler onecycle

Everything here does nothing in a run of one process, so that the loop is written once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import imports

# A process that waits longer than this for the others takes them for dead.
TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True)
class Processes:
    """Which of how many processes this is. A run without torchrun is one process of one."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0  # among those of this machine: the number of its GPU

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def from_environment(cls) -> Processes:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return cls(*(int(os.environ[name]) for name in names)) if "TORCHELASTIC_RUN_ID" in os.environ else cls()

    @contextmanager
    def connected(self, device: imports.torch.device) -> Iterator[None]:
        """Meet the other processes, and part from them at the end."""
        if self.count == 1:
            yield
            return
        backend, gpu = ("nccl", device) if device.type == "cuda" else ("gloo", None)
        if gpu is not None:
            imports.torch.cuda.set_device(gpu)
        imports.dist.init_process_group(backend, timeout=TIMEOUT, device_id=gpu)
        try:
            yield
        finally:
            imports.dist.destroy_process_group()

    def part_weights(self, images: int, batch_size: int) -> Iterator[float]:
        """What to multiply this process's mean loss by, batch by batch, so that the processes' mean is the batch's.

        1 but where the processes' parts differ in size, as those of an epoch's last batch may.
        """
        for start in range(0, images, batch_size):
            whole = min(batch_size, images - start)
            part = whole // self.count + (self.rank < whole % self.count)
            yield part * self.count / whole

    def sum(self, tensor: imports.torch.Tensor) -> imports.torch.Tensor:
        """The sum of all processes' tensors, in place."""
        if self.count > 1:
            imports.dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """Every process's ``value``, in the order of their ranks; to be called by all, of use to the main one."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        imports.dist.all_gather_object(values, value)
        return values

    def synchronized(self, model: imports.nn.Module, device: imports.torch.device) -> imports.nn.Module:
        """``model`` with rank 0's weights everywhere and gradients averaged over the processes."""
        if self.count == 1:
            return model
        # BatchNorm's running statistics stay each process's own until ``copy_buffers``: one exchange an epoch
        # in place of one a step
        engine: Callable[..., imports.nn.Module] = imports.DistributedDataParallel
        named = "forward_sync_buffers" if hasattr(engine, "broadcast_buffers") else "broadcast_buffers"  # before 2.14
        return engine(model, device_ids=[device] if device.type == "cuda" else None, **{named: False})

    def copy_buffers(self, model: imports.nn.Module) -> None:
        """Give every process rank 0's BatchNorm statistics: those that are evaluated and saved."""
        if self.count > 1:
            for buffer in model.buffers():
                imports.dist.broadcast(buffer, src=0)


ALONE = Processes()
