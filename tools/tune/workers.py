"""This machine's workers, from outside: started, waited for, stopped, and what they have come to told line by line."""

import contextlib
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import optuna
from optuna.trial import FrozenTrial

from common.files import UsageError
from tools.tune.results import best_trials
from tools.tune.storage import TuneError
from tools.tune.worker import Job, finished, is_under_way, work


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
        """Whether any of them works."""
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
    """Start ``count`` workers and wait until the study is done.

    Raises:
        UsageError, TuneError: none is left, and it is not done.
    """
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
    """The end of a trial in a few words."""
    head = f"trial {trial.number:<3}"
    if "recipe" in trial.params:
        head += f" {trial.params['recipe']:<13} seed {trial.params['seed']}"
    if trial.state.name == "FAIL":
        return f"{head} lost"
    if "diverged" in trial.user_attrs:
        return f"{head} diverged"
    return f"{head} {trial.value:.2f} %" + (f" after epoch {trial.last_step}" if trial.state.name == "PRUNED" else "")
