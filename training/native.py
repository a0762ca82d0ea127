"""The kernels of a CPU, ``models/kernels.cpp``: compiled once on a machine, kept, loaded; and whether a GPU's run.

network = with_kernels(network, print)      # as the kernels compute it, or itself
"""

import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

from common.cli import Log
from common.files import PROJECT_DIR, write_whole
from imports import FileLock, nn, torch
from models.kernels import KernelNetwork, UnknownLayersError
from training.machine import first_line

SOURCE = PROJECT_DIR / "models" / "kernels.cpp"
# what PyTorch calls the processor's instructions -> what compilers call them
INSTRUCTIONS = {"AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], "AVX2": ["-mavx2", "-mfma"]}
FLAGS = ["-std=c++20", "-O3", "-fopenmp", "-shared", "-fPIC"]
DIGEST_BYTES = hashlib.sha256().digest_size


class KernelsError(RuntimeError):
    """The kernels cannot be had here; one line says why."""


def with_kernels(network: nn.Module, log: Log, gpu: torch.device | None = None) -> nn.Module:
    """``network`` as the kernels of the CPU or ``gpu`` compute it; itself where they cannot, and ``log`` hears why."""
    try:
        if gpu is None:
            load_kernels(log)
        fast = KernelNetwork(network)
        if gpu is not None and (not find_spec("triton") or torch.cuda.get_device_capability(gpu) < (8, 0)):
            raise KernelsError("Triton is not here, or this GPU is older than it needs")
        shapes, blocks = [weight.shape for weight in fast.layers.parameters], [0, *fast.layers.blocks, 0]
        if gpu is not None and (max(map(max, shapes)) > 16 or (0, 0) in pairwise(blocks)):
            raise KernelsError("they know blocks of at most 16 channels, and 1x1 convolutions only between two blocks")
        return fast
    except (KernelsError, UnknownLayersError) as error:
        log(f"Note: without the {'CPU' if gpu is None else 'GPU'} kernels, so slower: {error}")
        return network


def load_kernels(log: Log) -> None:
    """Load the kernels into this process. The first time on a machine they are compiled, and ``log`` hears of it.

    They are kept in the user's cache (``$XDG_CACHE_HOME``, else ``~/.cache``), under a name that changes with
    the source, the processor's instructions, the compiler's command and PyTorch. A KernelsError if there is no
    compiler that can compile them, or no place to keep them.
    """
    try:
        compiler = [*shlex.split(os.environ.get("CXX") or "c++"), *FLAGS]
        compiler += INSTRUCTIONS.get(torch.backends.cpu.get_cpu_capability(), [])
        decisive = [SOURCE.read_text(encoding="utf-8"), str(torch.__version__), platform.machine(), *compiler]
        key = hashlib.sha256("\0".join(decisive).encode())
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "small_networks"
        library = cache / f"kernels-{key.hexdigest()[:16]}.so"
        if not _is_whole(library):
            cache.mkdir(parents=True, exist_ok=True)
            with FileLock(library.with_suffix(".lock")):  # processes that start together compile them once
                if not _is_whole(library):
                    log("Note: compiling the CPU kernels, once on this machine.")
                    _compile(compiler, library)
        torch.ops.load_library(library)
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: of CXX; RuntimeError: there is no home, or ours
        raise KernelsError(first_line(error)) from None


def _is_whole(library: Path) -> bool:
    """Whether ``library`` is there and ends with the digest of the rest: loading a part of one ends the process."""
    try:
        content = library.read_bytes()
    except FileNotFoundError:
        return False
    return content[-DIGEST_BYTES:] == hashlib.sha256(content[:-DIGEST_BYTES]).digest()


def _compile(compiler: list[str], library: Path) -> None:
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / library.name
        command = [*compiler, f"-I{home / 'include'}", str(SOURCE), f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10"]
        done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, errors="replace")
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error: " in line]
            raise KernelsError(f"{compiler[0]}: {errors[0] if errors else f'exit status {done.returncode}'}")
        content = made.read_bytes()
    write_whole(library, content + hashlib.sha256(content).digest())
