import math

import pytest

from imports import OneCycleLR, StepLR, optim, torch
from lr_schedulers import advances_every_batch, get_scheduler


def rates(name: str, epochs: int, steps_per_epoch: int, **options: float) -> list[float]:
    """The learning rate of every batch, with the schedule advanced as the loop advances it."""
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01, momentum=0.9)
    scheduler = get_scheduler(name, optimizer, epochs, steps_per_epoch, **options)
    found = []
    for _ in range(epochs):
        for _ in range(steps_per_epoch):
            found.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if advances_every_batch(name):
                scheduler.step()
        if not advances_every_batch(name):
            scheduler.step()
    return found


def cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


@pytest.mark.parametrize("max_lr", [0.75, 0.3])
def test_onecycle_over_every_batch(max_lr):
    epochs, steps = 15, 469
    found = rates("onecycle", epochs, steps, max_lr=max_lr)
    total = epochs * steps
    peak_at, last = 0.3 * total - 1, total - 1
    low, end = max_lr / 7.5, max_lr / 7.5 / 7.5
    expected = [
        cosine(low, max_lr, i / peak_at) if i <= peak_at else cosine(max_lr, end, (i - peak_at) / (last - peak_at))
        for i in range(total)
    ]
    assert found == pytest.approx(expected, rel=1e-9)
    assert found[0] == pytest.approx(max_lr / 7.5)
    assert max(found) == pytest.approx(max_lr, rel=1e-4)
    assert found.index(max(found)) == pytest.approx(0.3 * total, abs=1)
    assert found[-1] == pytest.approx(max_lr / 56.25)


def test_onecycle_reaches_the_specified_rates():
    found = rates("onecycle", 10, 100)
    assert found[0] == pytest.approx(0.1)
    assert found[299] == pytest.approx(0.75)
    assert found[-1] == pytest.approx(0.1 / 7.5)


def test_step_divides_by_ten_every_six_epochs():
    found = rates("step", 15, 7)
    expected = [0.01] * 6 * 7 + [0.001] * 6 * 7 + [0.0001] * 3 * 7
    assert found == pytest.approx(expected, rel=1e-9)


def test_types_and_momentum():
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01, momentum=0.9)
    assert type(get_scheduler("step", optimizer, 1, 10)) is StepLR
    assert type(get_scheduler("onecycle", optimizer, 1, 10)) is OneCycleLR
    assert optimizer.param_groups[0]["momentum"] == 0.9


def test_unknown_name_lists_the_known_ones():
    optimizer = optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.01)
    with pytest.raises(ValueError, match="unknown scheduler 'cosine'; known: step, onecycle"):
        get_scheduler("cosine", optimizer, 1, 1)
