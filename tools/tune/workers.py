"""The workers of a study: processes, here or on another machine, that take trials from its database.

``run_workers`` starts those of this machine, waits for them, stops them; ``Progress`` tells what they have come to.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import platform
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import optuna
from optuna.trial import FrozenTrial

import imports
from common.cli import silent
from common.files import CommandError, UsageError
from tools.tune.space import suggest
from tools.tune.storage import GRACE, TuneError, open_storage, quiet, storage_errors
from training.config import TrainConfig

# A trial ends early if it is among the worst quarter at an epoch, from the middle of its schedule on. Not the worst
# half, and not sooner: while the rate is high the accuracy says little of what annealing will make of it
# (docs/tune.md).
KEPT_PERCENT = 75.0
RANDOM_TRIALS = 10  # before the sampler and the pruner have enough to learn from
CONFIRM_SEED = 1_000_000  # the seeds of --confirm come after this one, the trials' before


@dataclass(frozen=True)
class Job:
    storage: str
    study: str
    trials: int  # to be finished; 0: those that wait
    epochs: int
    threads: int
    device: str
    data_dir: str
    sampler_seed: int | None = None

    def to_come(self, trials: Sequence[FrozenTrial]) -> int:
        """How many trials are neither done nor under way; below 0 if there are more than were asked for."""
        states = Counter(trial.state.name for trial in trials)
        return self.trials - finished(trials) - states["RUNNING"] if self.trials else states["WAITING"]


def finished(trials: Sequence[FrozenTrial]) -> int:
    """How many of ``trials`` are done: those that were pruned count, those that were lost do not."""
    states = Counter(trial.state.name for trial in trials)
    return states["COMPLETE"] + states["PRUNED"]


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained to the end, best first; of equal ones the first."""
    complete = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)


def is_under_way(trials: Sequence[FrozenTrial]) -> bool:
    return any(trial.state.name == "RUNNING" for trial in trials)


def work(job: Job, troubles: Connection) -> None:
    """The process of a worker: take part in the study until it is done or SIGTERM says to stop; tell an error."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.append(signum))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent passes it on
    parent = multiprocessing.parent_process()

    def stop_requested() -> bool:
        return bool(stop) or (parent is not None and not parent.is_alive())

    try:
        with quiet(), storage_errors(job.storage):
            Worker(job, stop_requested).run()
    except UsageError as error:
        troubles.send((2, str(error)))
    except (CommandError, OSError) as error:
        troubles.send((1, str(error)))


class Worker:
    def __init__(self, job: Job, stop_requested: Callable[[], bool]) -> None:
        self.job, self.stop_requested = job, stop_requested
        self.storage = open_storage(job.storage)
        # TPE: best of Optuna's samplers where settings depend on each other, some exist only with others, and there are
        # tens of trials (Watanabe 2023, arXiv:2304.11127). It fits good and bad trials jointly (multivariate), each
        # branch by itself (group), and takes trials under way for bad ones, so that workers do not do the same twice.
        sampler = optuna.samplers.TPESampler(
            seed=job.sampler_seed, n_startup_trials=RANDOM_TRIALS, multivariate=True, group=True, constant_liar=True
        )
        pruner = optuna.pruners.PercentilePruner(
            KEPT_PERCENT, n_startup_trials=RANDOM_TRIALS, n_warmup_steps=(job.epochs + 1) // 2
        )
        self.study = optuna.load_study(study_name=job.study, storage=self.storage, sampler=sampler, pruner=pruner)
        self.recipe = self.study.user_attrs["recipe"]
        self.seen: dict[int, float] = {}
        self.current: optuna.Trial | None = None

    def run(self) -> None:
        """Work until the study is done, and no trial of it is under way anywhere."""
        from training.run import StoppedError

        objective = self.search if self.job.trials else self.confirm
        while not self.stop_requested():
            optuna.storages.fail_stale_trials(self.study)
            self.fail_never_begun()
            trials = self.study.get_trials(deepcopy=False)
            if self.job.to_come(trials) <= 0:
                if not is_under_way(trials):
                    return
                time.sleep(0.5)  # the worker of one may die, and its trial come back
                continue
            try:
                self.study.optimize(objective, n_trials=1)
            except StoppedError:
                assert self.current is not None
                self.try_again(self.current.number)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
                # This process stood still for so long that it was taken for dead, and its trial given to another.
                if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a "):
                    raise

    def fail_never_begun(self) -> None:
        """Give up trials whose worker died between taking them and its first heartbeat, which Optuna does not see."""
        running = self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,))
        unsigned = [
            trial.number for trial in running if trial.user_attrs.get("worker", {}).get("trial") != trial.number
        ]
        self.seen = {number: self.seen.get(number, time.monotonic()) for number in unsigned}
        for number, since in self.seen.items():
            if time.monotonic() - since > GRACE:
                # another worker did
                with contextlib.suppress(ValueError, optuna.exceptions.UpdateFinishedTrialError):
                    self.study.tell(number, state=optuna.trial.TrialState.FAIL)
                    self.try_again(number)

    def try_again(self, number: int) -> None:
        callback = self.storage.get_heartbeat_stale_trial_callback()
        assert callback is not None
        callback(self.study, self.study.get_trials()[number])

    def sign(self, trial: optuna.Trial) -> None:
        self.current = trial
        trial.set_user_attr("worker", {"trial": trial.number, "host": platform.node(), "pid": os.getpid()})

    def search(self, trial: optuna.Trial) -> float:
        """Train with settings that the sampler chooses. Returns the validation accuracy in percent."""

        def report(metrics: dict[str, Any]) -> None:
            accuracies = metrics["val_acc"]
            trial.report(accuracies[-1], len(accuracies))
            if len(accuracies) < settings["epochs"] and trial.should_prune():
                raise optuna.TrialPruned

        self.sign(trial)
        settings = self.recipe["fixed"] | suggest(trial, self.recipe["space"], self.recipe["fixed"])
        # the same trial again has the seed that it had
        seed = self.recipe["fixed"]["seed"] + trial.number
        settings["seed"] = trial.user_attrs.get("settings", {}).get("seed", seed)
        return self.train(trial, settings, report)[0]

    def confirm(self, trial: optuna.Trial) -> float:
        """Train with one of the recipes that are compared, and evaluate on the test images at the end."""
        from data_utils import load_data
        from training.run import nobody_listens
        from training.step import evaluate

        self.sign(trial)
        settings = dict(self.recipe[trial.suggest_categorical("recipe", list(self.recipe))])
        settings["seed"] = trial.suggest_int("seed", CONFIRM_SEED, 2 * CONFIRM_SEED)
        accuracy, model = self.train(trial, settings, nobody_listens)
        device = next(model.parameters()).device
        test = load_data(TrainConfig(data_dir=self.job.data_dir), device, silent).test
        assert test is not None
        trial.set_user_attr("test_accuracy", round(evaluate(model, test, device)[1], 4))
        return accuracy

    def train(
        self, trial: optuna.Trial, settings: dict[str, Any], after_epoch: Callable[[dict[str, Any]], None]
    ) -> tuple[float, imports.nn.Module]:
        """Train once without the test set. Returns the last epoch's validation accuracy in percent and the network."""
        from training.machine import resolve_device
        from training.report import TrainingError
        from training.setup import prepare_run

        device = resolve_device(self.job.device)
        settings["threads"], settings["device"] = self.job.threads, str(device)
        trial.set_user_attr("settings", settings)
        with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stderr(io.StringIO()):  # no progress bar
            config = TrainConfig(**settings, name="trial", data_dir=self.job.data_dir, output_dir=output_dir)
            config.files.make_folders()
            run = prepare_run(config, device, log=silent, with_test=False)
            run.stop_requested, run.after_epoch = self.stop_requested, after_epoch
            versions = run.metrics["environment"] | {"optuna": optuna.__version__}
            trial.set_user_attr("environment", versions)
            try:
                run.train()
            except TrainingError as error:
                trial.set_user_attr("diverged", str(error))
                raise optuna.TrialPruned from None  # the sampler learns from it, as it does not from a failed trial
        return run.metrics["val_acc"][-1], run.result


class Workers:
    """The workers of this machine, and what the study that they work on has come to."""

    def __init__(self, job: Job, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.processes: list[tuple[BaseProcess, Connection]] = []
        # A child that Ctrl-C reaches before it has its own handlers would say so in ten lines.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(count):
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=work, args=(job, there))
                process.start()
                there.close()
                self.processes.append((process, here))
        finally:
            signal.signal(signal.SIGINT, handler)

    def alive(self) -> bool:
        return any(process.is_alive() for process, _ in self.processes)

    def stop(self) -> None:
        """Have them give back the trials under way, and wait for them; a second interrupt ends them at once."""
        try:
            for process, _ in self.processes:
                process.terminate()
            for process, _ in self.processes:
                process.join()
        except KeyboardInterrupt:
            for process, _ in self.processes:
                process.kill()
            raise

    def troubles(self) -> list[tuple[int, str]]:
        """The exit status and the line of every worker that did not end well."""
        found = []
        for process, connection in self.processes:
            with contextlib.suppress(EOFError):
                if connection.poll():
                    found.append(connection.recv())
                    continue
            if process.exitcode:
                reason = signal.Signals(-process.exitcode).name if process.exitcode < 0 else process.exitcode
                found.append((1, f"worker {process.pid} ended early ({reason})"))
        return sorted(set(found), reverse=True)


def run_workers(study: optuna.Study, job: Job, count: int, progress: Callable[[], None]) -> None:
    """Start ``count`` workers and wait until the study is done; a TuneError or UsageError if they end before."""
    trials = study.get_trials(deepcopy=False)
    if job.to_come(trials) <= 0 and not is_under_way(trials):
        return
    workers = Workers(job, count)
    try:
        while workers.alive():
            progress()
            time.sleep(0.5)
    finally:
        workers.stop()
    progress()
    trials = study.get_trials(deepcopy=False)
    troubles = workers.troubles()
    if job.to_come(trials) <= 0 and not is_under_way(trials):
        for _, line in troubles:
            print(f"Note: {line}; {'its trial was tried again' if 'ended early' in line else 'the others went on'}.")
        return
    status, line = troubles[0] if troubles else (1, "the workers ended early")
    raise UsageError(line) if status == 2 else TuneError(f"{line}; the same command goes on")


class Progress:
    """A line for every trial that ends: its value, how many are done and pruned, the best so far, the time left."""

    def __init__(self, study: optuna.Study, wanted: int) -> None:
        self.study, self.wanted = study, wanted
        trials = study.get_trials(deepcopy=False)
        self.told = {trial.number for trial in trials if trial.state.is_finished()}
        self.before, self.began = finished(trials), time.monotonic()
        if self.before:
            print(f"Going on with {study.study_name}: {self.before} of {wanted} trials are done.", flush=True)

    def __call__(self) -> None:
        trials = self.study.get_trials(deepcopy=False)
        for trial in trials:
            if trial.state.is_finished() and trial.number not in self.told:
                self.told.add(trial.number)
                print(f"{what_became_of(trial)} | {self._summary(trials)}", flush=True)

    def _summary(self, trials: Sequence[FrozenTrial]) -> str:
        done, names = finished(trials), Counter(trial.state.name for trial in trials)
        parts = [f"{done} of {self.wanted} done, {names['PRUNED']} pruned"]
        best = best_trials(self.study)
        if best and "recipe" not in best[0].params:
            parts.append(f"best {best[0].value:.2f} % (trial {best[0].number})")
        if self.before < done < self.wanted:
            left = (time.monotonic() - self.began) / (done - self.before) * (self.wanted - done)
            parts.append(f"about {left / 60:.0f} min left" if left >= 60 else f"about {left:.0f} s left")
        return " | ".join(parts)


def what_became_of(trial: FrozenTrial) -> str:
    head = f"trial {trial.number:<3}"
    if "recipe" in trial.params:
        head += f" {trial.params['recipe']:<13} seed {trial.params['seed']}"
    if trial.state.name == "FAIL":
        return f"{head} lost"
    if "diverged" in trial.user_attrs:
        return f"{head} diverged"
    return f"{head} {trial.value:.2f} %" + (f" after epoch {trial.last_step}" if trial.state.name == "PRUNED" else "")
