"""The workers of a study: processes, here or on another machine, that take trials from its database."""

import contextlib
import io
import multiprocessing
import os
import platform
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from common.cli import silent
from common.files import CommandError, UsageError
from common.results import Metrics
from tools.tune.space import ONLY_WITH, TYPES
from tools.tune.storage import open_storage, using_storage
from training.config import TrainConfig
from training.machine import resolve_device
from training.report import TrainingError
from training.run import StoppedError
from training.setup import prepare_run

# A trial ends early if it is among the worst quarter at an epoch, from the middle of its schedule on; docs/tune.md
# tells why no more and no sooner.
KEPT_PERCENT = 75.0
RANDOM_TRIALS = 10  # before the sampler and the pruner have enough to learn from
CONFIRM_SEED = 1_000_000  # the seeds of --confirm come after this one, the trials' before


@dataclass(frozen=True)
class Job:
    storage: str
    study: str
    trials: int  # to be finished; 0: those that wait
    config: TrainConfig  # of which epochs, threads, device and data_dir count
    sampler_seed: int | None = None

    def left(self, study: optuna.Study) -> tuple[int, int]:
        """How many trials of the study are neither done nor under way, and how many are under way anywhere."""
        states = states_of(study)
        to_come = self.trials - states["DONE"] - states["RUNNING"] if self.trials else states["WAITING"]
        return max(to_come, 0), states["RUNNING"]


def states_of(study: optuna.Study) -> Counter[str]:
    """How many trials are of each state, and "DONE": those that were pruned count, those that were lost do not."""
    states = Counter(trial.state.name for trial in study.get_trials(deepcopy=False))
    return states + Counter(DONE=states["COMPLETE"] + states["PRUNED"])


def best_trials(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained to the end, best first; of equal ones the first."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: trial.value or 0.0, reverse=True)


def work(job: Job, troubles: Connection) -> None:
    """The process of a worker: take part in the study until it is done or SIGTERM says to stop; tell an error."""
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda signum, frame: stop.append(signum))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes; the parent passes it on
    threading.excepthook = lambda of: None  # what ends the heartbeat is what the trial meets next, and tells
    parent = multiprocessing.parent_process()

    def stop_requested() -> bool:
        return bool(stop) or (parent is not None and not parent.is_alive())

    try:
        with using_storage(job.storage):
            Worker(job, stop_requested).run()
    except (UsageError, CommandError, OSError) as error:
        troubles.send((2 if isinstance(error, UsageError) else 1, str(error)))


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
            KEPT_PERCENT, n_startup_trials=RANDOM_TRIALS, n_warmup_steps=(job.config.epochs + 1) // 2
        )
        self.study = optuna.load_study(study_name=job.study, storage=self.storage, sampler=sampler, pruner=pruner)
        self.recipe = self.study.user_attrs["recipe"]
        self.seen: set[int] = set()

    def run(self) -> None:
        """Work until the study is done, and no trial of it is under way anywhere."""
        objective = self.search if self.job.trials else self.confirm
        while not self.stop_requested():
            optuna.storages.fail_stale_trials(self.study)
            self.give_first_heartbeats()
            to_come, running = self.job.left(self.study)
            if not to_come:
                if not running:
                    return
                time.sleep(0.5)  # the worker of one may die, and its trial come back
                continue
            try:
                self.study.optimize(objective, n_trials=1, catch=StoppedError)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError) as error:
                # This process stood still for so long that it was taken for dead, and its trial given to another.
                if isinstance(error, ValueError) and not str(error).startswith("Cannot tell a "):
                    raise
            except UnboundLocalError as error:  # Optuna's own, where the database refuses what a trial came to
                raise error.__context__ or error from None

    def give_first_heartbeats(self) -> None:
        """Let Optuna see trials whose worker died between taking them and its first heartbeat."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            signed = trial.user_attrs.get("worker", {}).get("trial") == trial.number
            if not signed and trial.number not in self.seen:
                self.seen.add(trial.number)
                self.storage.record_heartbeat(trial._trial_id)

    def search(self, trial: optuna.Trial) -> float:
        """Train with settings that the sampler chooses. Returns the validation accuracy in percent."""

        def report(metrics: Metrics) -> None:
            accuracies = metrics["val_acc"]
            trial.report(accuracies[-1], len(accuracies))
            if len(accuracies) < settings["epochs"] and trial.should_prune():
                raise optuna.TrialPruned

        settings = self.recipe["fixed"] | suggest(trial, self.recipe["space"], self.recipe["fixed"])
        # the same trial again has the seed that it had
        seed = self.recipe["fixed"]["seed"] + trial.number
        settings["seed"] = trial.user_attrs.get("settings", {}).get("seed", seed)
        return float(self.train(trial, settings, report, with_test=False)["val_acc"][-1])

    def confirm(self, trial: optuna.Trial) -> float:
        """Train with one of the recipes that are compared, and evaluate on the test images too."""
        settings = dict(self.recipe[trial.suggest_categorical("recipe", list(self.recipe))])
        settings["seed"] = trial.suggest_int("seed", CONFIRM_SEED, 2 * CONFIRM_SEED)
        metrics = self.train(trial, settings, silent, with_test=True)
        trial.set_user_attr("test_accuracy", metrics["test_acc"][-1])
        return float(metrics["val_acc"][-1])

    def train(
        self, trial: optuna.Trial, settings: dict[str, Any], after_epoch: Callable[[Metrics], None], with_test: bool
    ) -> Metrics:
        """Train once. Without ``with_test`` the test images are not read."""
        trial.set_user_attr("worker", {"trial": trial.number, "host": platform.node(), "pid": os.getpid()})
        device = resolve_device(self.job.config.device)
        settings["threads"], settings["device"] = self.job.config.threads, str(device)
        trial.set_user_attr("settings", settings)
        with tempfile.TemporaryDirectory() as output_dir, contextlib.redirect_stderr(io.StringIO()):  # no progress bar
            config = TrainConfig(**settings, name="trial", data_dir=self.job.config.data_dir, output_dir=output_dir)
            config.files.make_folders()
            run = prepare_run(config, device, log=silent, with_test=with_test)
            run.stop_requested, run.after_epoch = self.stop_requested, after_epoch
            trial.set_user_attr("environment", run.metrics["environment"] | {"optuna": optuna.__version__})
            try:
                run.train()
            except TrainingError as error:
                trial.set_user_attr("diverged", str(error))
                raise optuna.TrialPruned from None  # the sampler learns from it, as it does not from a failed trial
            except StoppedError:
                queue_again = self.storage.get_heartbeat_stale_trial_callback()
                assert queue_again is not None
                queue_again(self.study, self.study.get_trials()[trial.number])
                raise
        return run.metrics


def suggest(trial: optuna.Trial, space: Mapping[str, Any], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """One value of every setting in ``space`` that has an effect with the others, and with those in ``fixed``."""
    chosen: dict[str, Any] = {}
    for key, values in space.items():
        if key in ONLY_WITH:
            needed, allowed = ONLY_WITH[key]
            if {**fixed, **chosen}[needed] not in allowed:
                continue
        if isinstance(values, list):
            chosen[key] = trial.suggest_categorical(key, values)
        else:
            chosen[key] = (trial.suggest_int if TYPES[key] is int else trial.suggest_float)(key, **values)
    return chosen


def run_workers(study: optuna.Study, job: Job, count: int, progress: Callable[[], None]) -> None:
    """Start ``count`` workers and wait until the study is done; a CommandError or UsageError if they end before."""
    if not any(job.left(study)):
        return
    context = multiprocessing.get_context("spawn")
    told, troubles = context.Pipe(duplex=False)  # a line is written at once, so that all may have the one pipe
    workers = [context.Process(target=work, args=(job, troubles)) for _ in range(count)]
    # A child that Ctrl-C reaches before it has its own handlers would say so in ten lines.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for worker in workers:
            worker.start()
    finally:
        signal.signal(signal.SIGINT, handler)
    try:
        while any(worker.is_alive() for worker in workers):
            progress()
            time.sleep(0.5)
    finally:
        try:  # they give back the trials under way; a second interrupt ends them at once
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            for worker in workers:
                worker.kill()
            raise
    progress()
    found = set()  # exit status and line of those that did not end well
    while told.poll():
        found.add(told.recv())
    for worker in workers:
        if code := worker.exitcode:
            found.add((1, f"worker {worker.pid} ended early ({signal.Signals(-code).name if code < 0 else code})"))
    if any(job.left(study)):
        status, line = max(found, default=(1, "the workers ended early"))
        raise UsageError(line) if status == 2 else CommandError(f"{line}; the same command goes on")
    for _, line in sorted(found, reverse=True):
        print(f"Note: {line}; {'its trial was tried again' if 'ended early' in line else 'the others went on'}.")


def progress_of(study: optuna.Study, wanted: int) -> Callable[[], None]:
    """Prints a line for every trial that ended: its value, how many are done and pruned, the best, the time left."""
    told = {trial.number for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()}
    before, began = states_of(study)["DONE"], time.monotonic()
    if before:
        print(f"Going on with {study.study_name}: {before} of {wanted} trials are done.", flush=True)

    def tell() -> None:
        for trial in study.get_trials(deepcopy=False):
            if not trial.state.is_finished() or trial.number in told:
                continue
            told.add(trial.number)
            states, best = states_of(study), best_trials(study)
            done = states["DONE"]
            line = f"{what_became_of(trial)} | {done} of {wanted} done, {states['PRUNED']} pruned"
            if best and "recipe" not in best[0].params:
                line += f" | best {best[0].value:.2f} % (trial {best[0].number})"
            if before < done < wanted:
                left = (time.monotonic() - began) / (done - before) * (wanted - done)
                line += f" | about {left / 60:.0f} min left" if left >= 60 else f" | about {left:.0f} s left"
            print(line, flush=True)

    return tell


def what_became_of(trial: FrozenTrial) -> str:
    head = f"trial {trial.number:<3}"
    if "recipe" in trial.params:
        head += f" {trial.params['recipe']:<13} seed {trial.params['seed']}"
    if trial.state.name == "FAIL":
        return f"{head} lost"
    if "diverged" in trial.user_attrs:
        return f"{head} diverged"
    return f"{head} {trial.value:.2f} %" + (f" after epoch {trial.last_step}" if trial.state.name == "PRUNED" else "")
