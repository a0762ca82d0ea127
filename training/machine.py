"""What the machine offers a training: its device, its number formats, its memory, its compiler, its versions."""

import contextlib
import ctypes
import os
import platform
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imports
from common.cli import Log
from common.files import PROJECT_DIR, UsageError
from imports import nn, torch
from training.processes import ALONE, Processes


class CompiledOrEager(nn.Module):
    """Runs full batches through torch.compile and the rest, for which it would compile again, as they are.

    Where nothing can be compiled (no C++ compiler, say) everything runs as it is, and ``log`` hears why.
    """

    def __init__(self, model: nn.Module, full_batch: int, log: Log) -> None:
        super().__init__()
        self.model, self.full_batch, self.log = model, full_batch, log
        self.compiled: Callable[[torch.Tensor], torch.Tensor] | None = torch.compile(model, dynamic=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.compiled is not None and len(images) == self.full_batch:
            try:
                return self.compiled(images)
            except RuntimeError as error:  # what torch.compile raises; one of the network's own comes again below
                self.log(f"Note: torch.compile does not work here, so the run goes on without: {first_line(error)}")
                self.compiled = None
        output: torch.Tensor = self.model(images)
        return output


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def has_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` computes in bfloat16 itself; elsewhere it is emulated, and slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16", False))


def make_deterministic(wanted: bool) -> None:
    """Choose between GPU algorithms that give the same result every time and the fastest; before any of them runs."""
    torch.backends.cudnn.benchmark = not wanted
    if wanted:
        # cuBLAS asks for it: docs.nvidia.com/cuda/cublas, "Results reproducibility"
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # warn_only: max pooling's backward pass is listed as not deterministic because overlapping windows add to one
    # place in any order. Those of these networks do not overlap.
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    # not what is written by the next kernel; the module is one with a property
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def keep_freed_memory() -> bool:
    """Tell glibc to keep the buffers that a step frees for the next one. Returns whether it will.

    By default it gives large ones back to the kernel, which must fault them in, page by page, at every step.
    Where the C library is another one nothing is done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # of mallopt(3): M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, in bytes; it answers 1 if all is well
    return all(libc.mallopt(option, size) for option, size in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20)))


def resolve_device(name: str, processes: Processes = ALONE) -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU; ``cuda`` is the GPU of the process's number.

    A UsageError if the device is not on this machine, or not one that several processes can share.
    """
    if processes.count > 1 and name not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device: {name!r} is not allowed with {processes.count} processes; use auto, cpu or cuda")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{processes.local_rank}"
    if name.startswith("cuda:"):
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name.removeprefix("cuda:")) >= found:
            raise UsageError(f"device: {name!r} is not on this machine ({found} CUDA devices); use cpu or auto")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("device: 'mps' is not on this machine; use cpu or auto")
    return torch.device(name)


def processor() -> str:
    """The processor's name, as far as the system tells it."""
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1]
    return platform.processor()


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers of a run depend on besides its configuration."""
    # --exclude: no tag in place of the commit's hash
    git = ["git", "-C", str(PROJECT_DIR)]
    describe = [*git, "describe", "--always", "--abbrev=40", "--exclude=*"]
    sources = ["*.py", "*.cpp", "*.toml"]  # not what runs write
    changed = [*git, "status", "--porcelain", "--untracked-files=no", "--", *sources]
    try:
        commit, changes = (
            subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (describe, changed)
        )
        commit += "-dirty" if changes else ""
    except (OSError, subprocess.SubprocessError):
        commit = None  # no git, or no repository
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": imports.torchvision.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "processor": processor(),
        "git_commit": commit,
    }
