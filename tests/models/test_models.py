import pytest

from imports import nn, summary, torch
from model_strategy import get_strategy
from models import model_v1, model_v2, model_v3
from models.blocks import ConvBlock
from models.dropout import Dropout

NETWORKS = {
    "1": (model_v1.Net, 7_720, "0.64"),
    "2": (model_v2.Net, 7_730, "0.64"),
    "3": (model_v3.Net, 8_650, "0.67"),
}
# Output shape after each convolution, pooling and linear layer, in order.
STEM = [(8, 26, 26), (16, 24, 24), (10, 24, 24), (10, 12, 12)]
STAGES = {
    "1": [*STEM, (16, 10, 10), (16, 8, 8), (10, 6, 6), (10, 6, 6), (10, 3, 3), (10, 1, 1), (10, 1, 1)],
    "2": [*STEM, (16, 10, 10), (16, 8, 8), (10, 6, 6), (10, 6, 6), (10, 3, 3), (10, 1, 1), (10,)],
    "3": [*STEM, (10, 10, 10), (16, 10, 10), (16, 8, 8), (10, 6, 6), (10, 6, 6), (10, 3, 3), (10, 1, 1), (10,)],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameter_count(name):
    net, parameters, _ = NETWORKS[name]
    assert sum(p.numel() for p in net().parameters()) == parameters


@pytest.mark.parametrize("name", NETWORKS)
def test_size_that_torchsummary_estimates(name, capsys):
    net, parameters, megabytes = NETWORKS[name]
    summary(net().eval(), (1, 28, 28), device="cpu")
    table = capsys.readouterr().out
    assert f"Total params: {parameters:,}" in table
    assert f"Estimated Total Size (MB): {megabytes}" in table


@pytest.mark.parametrize("name", NETWORKS)
def test_shape_of_every_stage(name):
    model = get_strategy(name).build().eval()
    shapes: list[tuple[int, ...]] = []
    stages = nn.Conv2d, nn.Linear, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d
    for module in model.modules():
        if isinstance(module, stages):
            module.register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape[1:])))
    model(torch.zeros(2, 1, 28, 28))
    assert shapes == STAGES[name]


@pytest.mark.parametrize("name", NETWORKS)
def test_output_is_log_probabilities(name):
    output = get_strategy(name).build().eval()(torch.randn(5, 1, 28, 28))
    assert output.shape == (5, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(5))


@pytest.mark.parametrize(("name", "p"), [("1", 0.01), ("2", 0.025), ("3", 0.025)])
def test_blocks_are_as_specified(name, p):
    model = get_strategy(name).build()
    blocks = [module for module in model.modules() if isinstance(module, ConvBlock)]
    assert len(blocks) == (7 if name == "3" else 6)
    for block in blocks:
        assert [type(layer) for layer in block] == [nn.Conv2d, nn.ReLU, nn.BatchNorm2d, Dropout]
        assert block[0].bias is None
        assert block[3].p == p
    outputs = {"1": nn.Conv2d, "2": nn.Linear, "3": nn.Linear}
    assert type(model.output) is outputs[name]
