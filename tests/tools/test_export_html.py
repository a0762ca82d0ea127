"""The file that reads digits by itself, opened from disk in Chromium without a network."""

import base64
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image, ImageDraw

from common.files import PROJECT_DIR, UsageError
from image_data.form import to_mnist
from imports import nn, torch
from model_strategy import get_strategy
from tests.browser import DIGITS, draw
from tests.measure import VARIATIONS
from tools.export.__main__ import main as export
from tools.export.html import write_html
from tools.networks import Network, load_network, probabilities
from tools.voting import Ensemble

SHIPPED = ["mnist_model_3", *(pytest.param(n, marks=pytest.mark.long) for n in ("mnist_model_1", "mnist_model_2"))]
PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
READ = "(all) => all.map((pixels) => Array.from(readDigit(Uint8Array.from(pixels))))"
NUMBERS = r'"numbers": "([^"]*)"'
FORM = "(all) => all.map((bytes) => Array.from(toMnist(Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0)), 280)))"


@pytest.fixture
def opened(browser):
    """Opens a file; at the end nothing may have been asked for, or said on the console."""
    contexts, problems = [], []

    def open_it(path, **options):
        contexts.append(browser.new_context(offline=True, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(180_000)
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(path.as_uri())
        page.on("request", lambda request: problems.append(request.url))
        return SimpleNamespace(page=page, problems=problems)

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture(scope="session")
def file(shipped_project, tmp_path_factory):
    path = tmp_path_factory.mktemp("html") / "mnist_model_3.html"
    write_html(load_network("mnist_model_3", shipped_project), path)
    return path


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", SHIPPED)
def test_it_reads_as_pytorch_does(name, count, opened, shipped_project, test_set, capsys):
    assert export(["--name", name, "--format", "html", "--output_dir", str(shipped_project)]) == 0
    path = shipped_project / "outputs" / f"{name}.html"
    size = path.stat().st_size
    assert capsys.readouterr().out == f"{path}: {size / 1000:.1f} kB\n"
    assert size <= 150_000
    images = test_set[0][:count].numpy()
    found = np.array(opened(path).page.evaluate(READ, images.reshape(count, -1).tolist()))
    expected = np.array(probabilities(load_network(name, shipped_project), images))
    assert np.abs(found - expected).max() < 1e-4
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_the_shipped_file_is_of_the_shipped_network(file):
    """Its numbers to a rounding, which another processor does otherwise."""
    pages = [path.read_text(encoding="utf-8") for path in (PROJECT_DIR / "outputs" / "mnist_model_3.html", file)]
    numbers = [np.frombuffer(base64.b64decode(re.search(NUMBERS, page)[1]), "<f4") for page in pages]
    assert np.allclose(*numbers, atol=1e-5)
    assert len({re.sub(NUMBERS, "", page) for page in pages}) == 1


@pytest.mark.parametrize("method", ["soft", "weighted", "hard"])
def test_an_ensemble_votes_as_in_python(method, opened, tmp_path, test_set):
    torch.manual_seed(0)
    members = [get_strategy(name).build() for name in "123"]
    ensemble = Ensemble(members, method, [0.5, 0.3, 0.2], temperature=0.7)
    path = tmp_path / "vote.html"
    network = Network("vote", "ensemble", ensemble, 24_100, None, {})
    write_html(network, path)
    images = test_set[0][:10].numpy()
    found = np.array(opened(path).page.evaluate(READ, images.reshape(10, -1).tolist()))
    assert np.abs(found - np.array(probabilities(network, images))).max() < 1e-5


@pytest.mark.parametrize("count", [5, pytest.param(125, marks=pytest.mark.long)])
def test_a_drawing_gets_mnists_form_as_on_the_server(count, file, opened, test_set):
    """3 s: of every variation ``count`` digits; a level is a rounding, and a row that moved would be many."""
    digits = test_set[0][:count].numpy()
    drawings = [vary(digit) for vary, digit in itertools.product(VARIATIONS.values(), digits)]
    page = opened(file).page
    found = np.array(
        page.evaluate(FORM, [base64.b64encode(drawing.tobytes()).decode() for drawing in drawings])
    ).reshape(-1, 28, 28)
    expected = np.stack([to_mnist(drawing) for drawing in drawings]).astype(int)
    assert (np.abs(found - expected).max((1, 2)) <= 1).mean() >= 0.99
    network = load_network("mnist_model_3")
    here, there = (np.array(probabilities(network, list(x.astype(np.uint8)))) for x in (found, expected))
    assert (here.argmax(1) == there.argmax(1)).all()


def test_what_is_drawn_uploaded_and_cleared(file, opened, tmp_path):
    page = opened(file).page
    assert page.text_content("#answer") == "Draw a digit"
    draw(page, DIGITS[7])
    assert page.text_content("#answer").startswith("7, ")
    assert page.evaluate("toMnist(new Float32Array(78400), 280)") is None
    page.click("#clear")
    assert page.text_content("#answer") == "Draw a digit"
    picture = Image.new("RGB", (640, 480), "white")
    ImageDraw.Draw(picture).line([(320, 60), (320, 420)], fill="navy", width=40)
    picture.save(tmp_path / "one.png")
    page.set_input_files("#upload", tmp_path / "one.png")
    page.locator("#answer", has_text="1, ").wait_for()
    (tmp_path / "no.png").write_bytes(b"nothing")
    page.set_input_files("#upload", tmp_path / "no.png")
    page.locator("#answer", has_text="no.png cannot be read as an image").wait_for()


def test_by_keyboard(file, opened):
    page = opened(file).page
    page.focus("#canvas")
    for key in ("ArrowUp",) * 12 + (" ",) + ("ArrowDown",) * 24 + (" ",):
        page.keyboard.press(key)
    assert page.text_content("#answer").startswith("1, ")
    page.click("#undo")
    assert page.text_content("#answer") == "Draw a digit"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessible_and_never_wider_than_a_phone(scheme, file, opened):
    page = opened(file, color_scheme=scheme, bypass_csp=True, **PHONE).page  # the check is a script of its own
    draw(page, DIGITS[4])
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_it_can_ask_for_nothing(file, opened):
    it = opened(file)
    assert it.page.evaluate("fetch('http://127.0.0.1:9').then(() => 'answered', () => 'refused')") == "refused"
    assert "Content Security Policy" in it.problems[0]
    it.problems.clear()


def test_layers_that_it_does_not_know(tmp_path):
    curved = get_strategy("3").build()
    curved.output = nn.Sequential(nn.Linear(10, 10), nn.Tanh())
    for net in (curved, nn.Sequential(nn.Flatten(), nn.Linear(784, 10), nn.LogSoftmax(1))):
        with pytest.raises(UsageError, match="format: html knows"):
            write_html(Network("own", "network", net, 0, None, {}), tmp_path / "own.html")
    assert not list(tmp_path.iterdir())
