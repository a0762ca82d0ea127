import sys

import pytest
from PIL import Image

from imports import torch
from tools import augment


def test_sheet_of_real_digits(mnist, tmp_path, capsys):
    flags = ["--policy", "elastic", "--digits", "3", "--draws", "4"]
    assert augment.main([*flags, "--data_dir", str(mnist), "--output_dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    sheet = tmp_path / "plots" / "augment_elastic.png"
    assert f"elastic: {printed.split()[1]} images/s" in printed
    assert str(sheet) in printed
    width, height = Image.open(sheet).size
    assert (width, height) == (400, 310)


def test_sheet_shows_the_originals_and_each_draw():
    originals, drawn = torch.zeros(2, 1, 28, 28), [torch.full((2, 1, 28, 28), level) for level in (100.0, 200.0)]
    figure = augment.contact_sheet(originals, drawn, "title")
    shown = [panel.images[0].get_array().mean() for panel in figure.axes]
    assert shown == [0, 100, 200, 0, 100, 200]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "mixup"], "'mixup' is not known; choose from none, rotate, affine, elastic"),
        (["--digits", "0"], "digits: 0 is not allowed; it must be from 1 to 100"),
        (["--strength", "-1"], "strength: -1.0 is not allowed; it must be from 0 to 10"),
        (["--data_dir", "/dev/null"], "/dev/null"),
    ],
)
def test_wrong_values_are_told_in_one_line(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as caught:
        sys.exit(augment.main([*flags, "--output_dir", str(tmp_path)]))
    assert caught.value.code in (1, 2)
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
