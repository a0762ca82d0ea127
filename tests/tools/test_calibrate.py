"""tools.calibrate: a temperature in the weights, and what is no digit."""

from dataclasses import replace
from pathlib import Path

import pytest
from torch.testing import assert_close

from common.files import RunFiles
from imports import torch
from model_strategy import get_strategy
from tools.calibrate import fold, main
from tools.evaluate.measures import predict
from tools.networks import load_network, unsure_of
from tools.sureness import Sureness, load_sureness, sureness_file
from tools.voting import scale


@pytest.mark.parametrize("model", ["1", "2", "3"])
def test_fold_is_scaling(model: str) -> None:
    network, images = get_strategy(model).build().eval(), torch.randn(20, 1, 28, 28)
    before = predict(network, images)
    fold(network, 0.6, images)
    assert_close(predict(network, images), scale(before, 0.6), atol=1e-5, rtol=1e-4)


def test_noise_is_unsure_and_the_file_gives_the_same(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, labels = get_strategy("1").build().eval(), torch.arange(10).repeat(30)
    digits = torch.zeros(300, 1, 28, 28)
    digits[:, :, 8:20, 8:20] = torch.rand(300, 1, 12, 12)
    sureness = Sureness.fit(network, digits, labels)
    told = sureness.scores(network, digits)
    sureness = replace(sureness, threshold=told.quantile(0.98))
    assert (sureness.scores(network, 5 * torch.randn(50, 1, 28, 28)) > sureness.threshold).all()
    (tmp_path / "outputs").mkdir()
    files = RunFiles("it", tmp_path)
    torch.save(sureness.as_tensors(), sureness_file(files))
    kept = load_sureness(files)
    assert kept is not None
    assert_close(kept.scores(network, digits), told)


def test_unknown_run_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outputs").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["--name", "nothing", "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "nothing_metrics.json does not exist" in capsys.readouterr().err


def test_other_data_is_a_usage_error(finished_run: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = finished_run.name, finished_run.params.parent.parent
    before = finished_run.params.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["--name", name, "--output_dir", str(folder)])
    assert stopped.value.code == 2
    assert finished_run.params.read_bytes() == before
    network = load_network(name, str(folder))
    assert unsure_of(network, [torch.zeros(28, 28, dtype=torch.uint8).numpy()], [[0.1] * 10]) == [False]
