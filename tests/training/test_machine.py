import os
import platform

import pytest
from conftest import finished

import main as command
from common.files import UsageError
from imports import nn, torch
from models import model_v1
from training import setup
from training.config import TrainConfig
from training.machine import CompiledOrEager, has_bfloat16, keep_freed_memory, make_deterministic, resolve_device
from training.processes import Processes
from training.setup import prepare_run
from visualization import load_metrics_json, load_model_params

CPU = torch.device("cpu")


def test_devices():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for absent in (f"cuda:{torch.cuda.device_count()}", "cuda:200", "cuda:99999999999"):
        with pytest.raises(UsageError, match=rf"device: '{absent}' is not on this machine"):
            resolve_device(absent)
    with pytest.raises(UsageError, match="device: 'cuda:0' is not allowed with 2 processes"):
        resolve_device("cuda:0", Processes(0, 2, 0))


def test_bfloat16_is_asked_of_the_processor(monkeypatch):
    assert isinstance(has_bfloat16(CPU), bool)
    for answer in (True, False):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda answer=answer: {"avx512_bf16": answer})
        assert has_bfloat16(CPU) is answer
    assert not has_bfloat16(torch.device("mps"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc: nothing is set")
def test_glibc_keeps_freed_memory():
    resource = pytest.importorskip("resource")
    assert keep_freed_memory()
    # a buffer of 8 MiB that is freed and taken again costs no page faults: the kernel never got it back
    for _ in range(3):
        torch.ones(2 << 20).sum()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2 << 20).sum()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 10_000  # 20 times 2048 pages otherwise


def test_full_batches_are_compiled_and_others_are_not(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda model, **_: lambda x: model(x) + 100)
    model = CompiledOrEager(nn.Identity(), full_batch=4, log=pytest.fail)
    assert torch.equal(model(torch.zeros(4)), torch.full((4,), 100.0))
    assert torch.equal(model(torch.zeros(3)), torch.zeros(3))


def test_a_compilation_that_fails_is_told_once_and_the_run_goes_on(monkeypatch):
    def broken(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler\nlong story")

    monkeypatch.setattr(torch, "compile", lambda model, **_: broken)
    lines: list[str] = []
    model = CompiledOrEager(nn.Identity(), full_batch=4, log=lines.append)
    for _ in range(2):
        assert torch.equal(model(torch.ones(4)), torch.ones(4))
    assert lines == ["Note: torch.compile does not work here, so the run goes on without: no compiler"]


def flags(data_dir, output_dir) -> list[str]:
    """Of two epochs by the command."""
    folders = ["--data_dir", str(data_dir), "--output_dir", str(output_dir)]
    return ["--epochs", "2", "--batch_size", "60", *folders]


def test_without_a_compiler_the_command_goes_on_and_says_so(tmp_path, tiny, python):
    env = {**os.environ, "CXX": "/nonexistent/c++"}
    done = finished(python("main.py", *flags(tiny, tmp_path), "--compile", "--device", "cpu", env=env))
    assert done.returncode == 0, done.stderr
    assert "Note: without the CPU kernels, so slower: " in done.stdout
    assert "Note: --compile has no effect on a CPU" in done.stdout
    metrics = load_metrics_json("mnist_model_1", tmp_path)
    assert metrics["status"] == "finished"
    assert metrics["environment"]["kernels"] is False


@pytest.mark.skipif(not has_bfloat16(CPU), reason="this processor has no bfloat16: --amp has no effect here")
def test_amp_leaves_the_same_kind_of_files(tmp_path, tiny):
    assert command.main([*flags(tiny, tmp_path), "--device", "cpu", "--amp"]) == 0
    model = load_model_params(model_v1.Net(), "mnist_model_1", tmp_path)
    assert {value.dtype for key, value in model.state_dict().items() if "tracked" not in key} == {torch.float32}
    metrics = load_metrics_json("mnist_model_1", tmp_path)
    assert (metrics["config"]["amp"], metrics["environment"]["kernels"]) == (True, False)
    assert metrics["train_losses"][-1] < metrics["train_losses"][0]


def test_amp_without_bfloat16_is_said(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(setup, "has_bfloat16", lambda device: False)
    lines: list[str] = []
    config = TrainConfig(epochs=1, amp=True, data_dir=str(tiny), output_dir=str(tmp_path))
    run = prepare_run(config, CPU, log=lines.append)
    assert not run.step.amp
    assert "Note: --amp has no effect: cpu here has no bfloat16 of its own." in lines


def test_deterministic_algorithms_on_request(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    benchmark = torch.backends.cudnn.benchmark
    try:
        make_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        make_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.benchmark
    finally:
        torch.backends.cudnn.benchmark = benchmark


def test_deterministic_on_a_cpu_is_said_to_change_nothing(tmp_path, tiny):
    lines = []
    config = TrainConfig(epochs=1, device="cpu", deterministic=True, data_dir=str(tiny), output_dir=str(tmp_path))
    prepare_run(config, CPU, log=lines.append)
    assert "Note: --deterministic changes nothing on a CPU: a run there is always the same." in lines
