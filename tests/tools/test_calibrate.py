"""tools.calibrate: a temperature in the weights, and what is no digit."""

import re
from pathlib import Path

import pytest
from torch.testing import assert_close

from common.cli import silent
from common.files import PROJECT_DIR, DamagedFileError, RunFiles
from data_utils import normalize
from image_data.fetch import sha256_of
from image_data.form import read_page
from imports import torch
from model_strategy import get_strategy
from tools.calibrate import fold, main
from tools.evaluate.measures import predict
from tools.networks import ask, load_network
from tools.sureness import fit, load_sureness, save_sureness, scores
from tools.voting import scale
from training.config import TrainConfig
from training.train import train_and_evaluate


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
    sureness = fit(network, digits, labels)
    told = scores(network, sureness, digits)
    sureness.threshold = told.quantile(0.98)
    assert (scores(network, sureness, 5 * torch.randn(50, 1, 28, 28)) > sureness.threshold).all()
    (tmp_path / "outputs").mkdir()
    files = RunFiles("it", tmp_path)
    torch.save(network.state_dict(), files.params)
    save_sureness(sureness, files, {"another's": 1.0, sha256_of(files.params): 0.7})
    kept = load_sureness(files, files.params)
    assert kept is not None
    assert (kept.threshold, kept.temperature) == (sureness.threshold, 0.7)
    assert_close(scores(network, kept, digits), told)
    save_sureness(sureness, files, {sha256_of(files.params): "hot"})  # type: ignore[dict-item]
    with pytest.raises(DamagedFileError, match="is damaged or of another version"):
        load_sureness(files, files.params)
    torch.save(get_strategy("1").build().state_dict(), files.params)
    assert load_sureness(files, files.params) is None  # it is of other weights


def test_unknown_run_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "outputs").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main(["--name", "nothing", "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert "nothing_metrics.json does not exist" in capsys.readouterr().err


@pytest.mark.long
def test_a_run_is_calibrated_once_however_often_it_is_asked(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 s: an epoch on 60,000 images and one of its twin on 50,000."""
    folders = {"data_dir": str(mnist), "output_dir": str(tmp_path)}
    config = TrainConfig(epochs=1, scheduler="onecycle", label_smoothing=0.05, name="run", **folders)
    train_and_evaluate(config, log=silent)
    before = load_network("run", tmp_path)
    flags = ["--name", "run", "--output_dir", str(tmp_path)]

    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:  # between the two files that it writes
        patch.setattr("tools.calibrate.write_whole", full_disk)
        assert main(flags) == 1
    stopped = load_network("run", tmp_path)
    assert stopped.sureness is not None
    assert stopped.sureness.temperature == 1
    assert main(flags) == 0
    once = load_network("run", tmp_path)
    assert main(flags) == 0
    twice = load_network("run", tmp_path)
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("run: ECE"))
    assert first == second
    was, became = (float(part) for part in re.findall(r"([\d.]+) %", first))
    assert became < 1 < was
    assert before.sureness is None
    assert once.sureness is not None
    assert once.sureness.temperature != 1
    inputs = normalize(torch.randint(256, (100, 1, 28, 28)).float())
    said = predict(once.model, inputs)
    assert_close(said, scale(predict(before.model, inputs), once.sureness.temperature), atol=1e-4, rtol=1e-4)
    assert_close(predict(twice.model, inputs), said, atol=1e-4, rtol=1e-4)


def test_other_data_is_a_usage_error(finished_run: RunFiles, capsys: pytest.CaptureFixture[str]) -> None:
    name, folder = finished_run.name, finished_run.params.parent.parent
    before = finished_run.params.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        main(["--name", name, "--output_dir", str(folder)])
    assert stopped.value.code == 2
    assert finished_run.params.read_bytes() == before
    network = load_network(name, str(folder))
    assert [unsure for _, unsure in ask(network, [torch.zeros(28, 28, dtype=torch.uint8).numpy()])] == [False]


@pytest.mark.parametrize("name", ["mnist_model_3", "ensemble"])
def test_what_is_no_digit_is_unsure(name: str, shipped_project: Path) -> None:
    network, cases = load_network(name, str(shipped_project)), PROJECT_DIR / "tests" / "cases"

    def unsure(case: Path) -> list[bool]:
        return [unsure for _, unsure in ask(network, read_page(case).images)]

    signs = ("ood_A", "ood_X", "ood_house", "ood_triangle")
    assert all(unsure(cases / f"{sign}.png") == [True] for sign in signs)
    digits = [path for path in cases.glob("*.png") if path.stem not in (*signs, "trunc")]
    assert len(digits) == 10
    assert not any(answer for path in digits for answer in unsure(path))


def test_onnx_gives_what_pytorch_does(test_set: tuple[torch.Tensor, torch.Tensor], shipped_project: Path) -> None:
    images = list(test_set[0][:200].numpy())
    for name in ("mnist_model_1", "mnist_model_2", "mnist_model_3", "ensemble"):
        network = load_network(name, str(shipped_project))
        rows, unsure = zip(*ask(network, images), strict=True)
        inputs = normalize(test_set[0][:200, None].float())
        with torch.inference_mode():
            assert_close(torch.tensor(rows), network.model(inputs).exp(), atol=1e-5, rtol=0)
        assert network.sureness is not None
        expected = scores(network.model, network.sureness, inputs) > network.sureness.threshold
        assert list(unsure) == expected.tolist()
