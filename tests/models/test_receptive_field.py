import pytest

from imports import F, nn, torch
from model_strategy import get_strategy
from models.receptive_field import LayerField, format_table, receptive_fields

# Layer -> (jump, field), worked out by hand from r_out = r_in + (k - 1) * j_in and j_out = j_in * s.
STEM = {
    "stem.0.0": (1, 3),  # 3x3:  1 + 2*1
    "stem.1.0": (1, 5),  # 3x3:  3 + 2*1
    "stem.2.0": (1, 5),  # 1x1
    "stem.2.1": (2, 6),  # 2x2 pooling:  5 + 1*1
    "block2.0.0": (2, 10),  # 3x3:  6 + 2*2
    "block2.1.0": (2, 14),
    "block2.2.0": (2, 18),
    "block2.3.0": (2, 22),
}
BY_HAND = {
    "1": {**STEM, "pool.0": (4, 24), "pool.1": (12, 32), "output": (12, 32)},  # 22 + 1*2, 24 + 2*4
    "2": {**STEM, "pool.0": (4, 24), "pool.1": (12, 32), "output": (12, 32)},
    "3": {**STEM, "block2.4.0": (2, 26), "pool.0": (4, 28), "pool.1": (12, 36), "output": (12, 36)},
}


def fields_of(*layers: nn.Module) -> list[LayerField]:
    return receptive_fields(nn.Sequential(*layers))


@pytest.mark.parametrize("name", BY_HAND)
def test_fields_worked_out_by_hand(name: str) -> None:
    rows = {row.name: (row.jump, row.field) for row in receptive_fields(get_strategy(name).build())}
    assert {layer: rows[layer] for layer in BY_HAND[name]} == BY_HAND[name]
    for block in ("stem.0", "stem.1", "block2.0", "block2.3"):  # ReLU, BatchNorm and Dropout see no further
        assert rows[f"{block}.0"] == rows[f"{block}.1"] == rows[f"{block}.2"] == rows[f"{block}.3"]


def test_rows_of_the_first_network() -> None:
    rows = receptive_fields(get_strategy("1").build())
    assert rows[0] == LayerField("stem.0.0", "Conv2d", (8, 26, 26), 72, kernel=3, stride=1, jump=1, field=3)
    assert rows[9] == LayerField("stem.2.1", "MaxPool2d", (10, 12, 12), 0, kernel=2, stride=2, jump=2, field=6)
    assert rows[-1] == LayerField("output", "Conv2d", (10, 1, 1), 100, kernel=1, stride=1, jump=12, field=32)


@pytest.mark.parametrize("name", BY_HAND)
def test_every_parameter_is_in_one_row(name: str) -> None:
    model = get_strategy(name).build()
    rows = receptive_fields(model)
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    assert [row.name for row in rows] == [key for key, module in model.named_modules() if not list(module.children())]


# The oracle: the pixels whose gradient is not zero, in a network where nothing cancels or is left out.


def positive_copy(name: str) -> nn.Module:
    """The network with positive weights, and with average for max pooling, which passes on one unit of four."""
    model = get_strategy(name).build().eval()
    for parent in list(model.modules()):
        for key, child in parent.named_children():
            if isinstance(child, nn.MaxPool2d):
                setattr(parent, key, nn.AvgPool2d(child.kernel_size))
            elif isinstance(child, nn.Conv2d | nn.Linear):
                nn.init.constant_(child.weight, 0.1)
    return model


def pixels_seen(model: nn.Module, layer: str, back: int = 0) -> torch.Tensor:
    """bool [28, 28]: what the unit in the middle of the layer's output depends on, or the one ``back`` before it."""
    units: list[torch.Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        unit = output.clone()[0, 0]  # of the first channel; a clone, for the ReLU that follows works in place
        while unit.dim():
            unit = unit[len(unit) // 2 - back]
        units.append(unit)

    hook = model.get_submodule(layer).register_forward_hook(keep)
    image = torch.ones(1, 1, 28, 28, requires_grad=True)
    model(image)
    hook.remove()
    (gradient,) = torch.autograd.grad(units[0], image)
    return gradient[0, 0] != 0


@pytest.mark.parametrize("name", BY_HAND)
def test_the_gradient_is_a_square_of_the_computed_size(name: str) -> None:
    model = positive_copy(name)
    for row in receptive_fields(model):
        seen = pixels_seen(model, row.name)
        # only the last layers, one unit wide, have a field larger than the image: they depend on all of it
        side = row.field if row.output[1] > 1 else 28
        lines, columns = seen.any(1).nonzero(), seen.any(0).nonzero()
        assert len(lines) == len(columns) == side, row
        assert lines.max() - lines.min() == columns.max() - columns.min() == side - 1, row
        assert seen.sum() == side**2, row


@pytest.mark.parametrize("name", BY_HAND)
def test_the_neighbours_square_is_a_jump_away(name: str) -> None:
    model = positive_copy(name)
    for row in receptive_fields(model):
        if row.output[1] > 1:
            ends = [pixels_seen(model, row.name, back).nonzero().max() for back in (0, 1)]
            assert ends[0] - ends[1] == row.jump, row


# Layers that the three networks do not have


def test_stride_dilation_and_a_flattened_map() -> None:
    rows = fields_of(
        nn.Conv2d(1, 2, kernel_size=3, stride=2, dilation=2),  # 28 -> 12; the kernel spans 5
        nn.AdaptiveAvgPool2d(4),  # 12 -> 4: windows of 3
        nn.Identity(),
    )
    assert [(row.kernel, row.stride, row.jump, row.field) for row in rows] == [(5, 2, 2, 5), (3, 3, 6, 9), (1, 1, 6, 9)]

    class Flattened(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pool, self.output = nn.AvgPool2d(4), nn.Linear(49, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = self.pool(x).flatten(1)
            return F.log_softmax(self.output(hidden), dim=1)

    last = receptive_fields(Flattened())[-1]
    assert last == LayerField("output", "Linear", (10, 1, 1), 500, kernel=7, stride=1, jump=4, field=28)


@pytest.mark.parametrize(
    ("layer", "complaint"),
    [
        (nn.Softmax2d(), "Softmax2d.* known: ReLU, .*, Linear"),
        (nn.Conv2d(1, 1, kernel_size=(3, 5)), "3x5 is not a square"),
        (nn.AdaptiveAvgPool2d(5), "28x28 units has windows of several sizes"),
    ],
)
def test_what_is_not_known_is_refused(layer: nn.Module, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        fields_of(layer)


def test_the_network_is_left_as_it_is() -> None:
    model = get_strategy("1").build().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    receptive_fields(model)
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_table() -> None:
    lines = format_table(fields_of(nn.Conv2d(1, 120, kernel_size=3, bias=False), nn.ReLU())).splitlines()
    assert [line.split() for line in lines] == [
        ["layer", "type", "output", "parameters", "kernel", "stride", "jump", "[px]", "field", "[px]"],
        ["0", "Conv2d", "120x26x26", "1,080", "3", "1", "1", "3"],
        ["1", "ReLU", "120x26x26", "0", "1", "1", "1", "3"],
    ]
    assert len({len(line) for line in lines}) == 1  # the columns stand under one another
