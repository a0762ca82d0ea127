"""From a configuration to a run that is ready for its first batch.

run = prepare_run(TrainConfig(model="3", epochs=15), torch.device("cpu"))
run.train()
run.save_results()
"""

from dataclasses import replace
from typing import Any

from common.cli import Log
from common.files import UsageError
from data_utils import Batches, TensorBatches, load_data
from imports import AveragedModel, get_ema_multi_avg_fn, nn, optim, torch
from lr_schedulers import advances_every_batch, get_scheduler
from model_strategy import ModelContext, get_strategy
from models.kernels import KernelNetwork
from training.captured import CapturedStep
from training.config import TrainConfig
from training.machine import CompiledOrEager, has_bfloat16, keep_freed_memory, make_deterministic
from training.native import with_kernels
from training.processes import ALONE, Processes
from training.report import Report, new_metrics, print_line
from training.run import Run
from training.step import Step
from visualization import load_weights, weights_file


def prepare_run(
    config: TrainConfig,
    device: torch.device,
    processes: Processes = ALONE,
    log: Log = print_line,
    with_test: bool = True,
    resumed: bool = False,
) -> Run:
    """Everything up to the first batch. Raises as ``train_and_evaluate``.

    ``with_test`` False: the test set is not read, and ``test_losses`` and ``test_acc`` stay empty. ``resumed``: its
    weights are still to come.
    """
    prepare_machine(config, device, log)
    amp = config.amp and has_bfloat16(device)
    if config.amp and not amp:
        log(f"Note: --amp has no effect: {device.type} here has no bfloat16 of its own.")
    data = load_data(config, device, log, (processes.rank, processes.count), with_test)
    check_last_batch(data.train_size, config, processes)
    if config.scheduler == "onecycle" and config.pct_start * config.epochs * len(data.train) == 1:
        raise UsageError(
            f"pct_start: {config.pct_start} is not allowed with {config.epochs} epochs of {len(data.train)} batches:"
            " onecycle would rise for one step, by which it divides; train longer, or choose another"
        )

    torch.manual_seed(config.seed)
    model = make_network(replace(config, init=None) if resumed else config, device)
    if processes.count > 1:  # the same weights, but dropout of its own in every process
        torch.manual_seed(config.seed + processes.rank)
    step_model = as_a_step_runs_it(model, config, device, amp, processes, log)
    optimizer = make_optimizer(config, model, device)
    shape = config.max_lr, config.pct_start, config.div_factor, config.final_div_factor
    scheduler = get_scheduler(config.scheduler, optimizer, config.epochs, len(data.train), *shape)
    average = None
    if config.ema_decay:  # of the running statistics too: they belong to the weights that they were taken with
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay), use_buffers=True)
    each_batch = scheduler if advances_every_batch(config.scheduler) else None
    recipe = each_batch, average, amp, config.label_smoothing, len(data.facts.classes)
    step = Step(processes.synchronized(step_model, device), optimizer, device, *recipe)
    kernels, result = isinstance(step_model, KernelNetwork), model if average is None else average.module
    evaluated = KernelNetwork(result) if kernels else result
    metrics = new_metrics(config, model, device, data.train_size) | {"data": data.facts.as_json()}
    metrics["environment"] |= {"processes": processes.count, "kernels": kernels}
    report = Report(config, metrics, device, processes, log)
    if device.type == "cuda" and config.graph:
        step = captured(step, data.train, processes, report)
    return Run(config, data, processes, model, result, evaluated, step, scheduler, report)


def captured(step: Step, batches: Batches, processes: Processes, report: Report) -> Step:
    """``step`` as one CUDA graph where that can be; elsewhere ``step`` itself, and the log and the metrics say so."""
    environment = report.metrics["environment"]

    def without(reason: str) -> None:
        environment["graph"] = False
        report.log(f"Note: without a CUDA graph, so slower: {reason}.")

    environment["graph"] = True
    if processes.count > 1:
        without("several processes exchange their gradients within a step")
    elif not isinstance(batches, TensorBatches):
        without("the torchvision pipeline makes its batches on the CPU")
    else:
        return CapturedStep(**vars(step), batches=batches, without=without)
    return step


def check_last_batch(train_size: int, config: TrainConfig, processes: Processes) -> None:
    """Make sure that there is a batch, and that every process has an image of the last one; else a UsageError."""
    if config.dataset != "mnist" and train_size < config.batch_size:
        raise UsageError(f"batch_size: {config.batch_size} is not allowed; there are {train_size} training images")
    last = train_size % config.batch_size
    if 0 < last < processes.count:
        raise UsageError(
            f"batch_size: {config.batch_size} is not allowed with {processes.count} processes; the last batch of"
            f" {train_size} images has {last}, and every process needs one"
        )


def prepare_machine(config: TrainConfig, device: torch.device, log: Log) -> None:
    """Threads, memory and algorithms, for the whole process."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if device.type == "cpu":
        keep_freed_memory()
        if config.deterministic:
            log("Note: --deterministic changes nothing on a CPU: a run there is always the same.")
    else:
        make_deterministic(config.deterministic)


def make_network(config: TrainConfig, device: torch.device) -> nn.Module:
    """The network that ``config`` names, new, with the dropout and the BatchNorm momentum that it sets."""
    model = ModelContext(get_strategy(config.model)).get_model(device).to(memory_format=torch.channels_last)
    if config.init is not None:
        try:
            load_weights(model, weights_file(config.init, config.output_dir)).train()
        except RuntimeError as error:
            raise UsageError(f"init: {error}") from None
    for layer in model.modules():
        if isinstance(layer, nn.Dropout) and config.dropout is not None:
            layer.p = config.dropout
        if isinstance(layer, nn.BatchNorm2d) and config.bn_momentum is not None:
            layer.momentum = config.bn_momentum
    return model


def as_a_step_runs_it(
    model: nn.Module, config: TrainConfig, device: torch.device, amp: bool, processes: Processes, log: Log
) -> nn.Module:
    """``model`` by kernels, compiled, or as it is."""
    if config.compile and device.type != "cpu":
        return CompiledOrEager(model, config.batch_size // processes.count, log)
    if config.compile:
        log("Note: --compile has no effect on a CPU: the kernels, which are the default there, are faster.")
    if not config.kernels or amp or device.type == "mps":
        return model
    return with_kernels(model, log, device if device.type == "cuda" else None)


def make_optimizer(config: TrainConfig, model: nn.Module, device: torch.device) -> optim.SGD:
    """SGD in which the weights of convolutions and linear layers decay, and nothing else does.

    BatchNorm's parameters and biases are left alone: He et al. 2018, arXiv:1812.01187, section 3.1.
    """
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    fused = device.type in ("cpu", "cuda")
    return optim.SGD(groups, config.lr, config.momentum, nesterov=config.nesterov, fused=fused)
