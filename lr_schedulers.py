"""Learning-rate schedules, by name.

scheduler = get_scheduler("onecycle", optimizer, epochs=15, steps_per_epoch=len(train_batches))
if advances_every_batch("onecycle"):   # else once an epoch
    scheduler.step()
"""

from __future__ import annotations

from typing import Any

import imports

SCHEDULERS = ("step", "onecycle")


def get_scheduler(
    name: str,
    optimizer: imports.optim.Optimizer,
    epochs: int,
    steps_per_epoch: int,
    max_lr: float = 0.75,
    pct_start: float = 0.3,
    div_factor: float = 7.5,
    final_div_factor: float = 7.5,
) -> imports.LRScheduler:
    """Build the schedule ``name`` for ``optimizer``; a ValueError if the name is unknown.

    ``step`` (StepLR) divides the optimizer's rate by ten every 6 epochs and is advanced once an epoch; the other
    arguments do not concern it. ``onecycle`` (OneCycleLR; Smith and Topin 2018, arXiv:1708.07120) rises on a cosine
    from ``max_lr / div_factor`` to ``max_lr`` over the part ``pct_start`` of all batches, falls to
    ``max_lr / div_factor / final_div_factor``, and is advanced once a batch.
    """
    if name == "step":
        return imports.StepLR(optimizer, step_size=6, gamma=0.1)
    if name == "onecycle":
        shape: Any = {"pct_start": pct_start, "div_factor": div_factor, "final_div_factor": final_div_factor}
        return imports.OneCycleLR(optimizer, max_lr, epochs * steps_per_epoch, cycle_momentum=False, **shape)
    raise ValueError(f"unknown scheduler {name!r}; known: {', '.join(SCHEDULERS)}")


def advances_every_batch(name: str) -> bool:
    """Whether the schedule ``name`` is stepped after every batch; the others after every epoch."""
    return name == "onecycle"
