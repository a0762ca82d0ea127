"""The page in a real, headless Chromium. A test takes 2 to 5 s: each opens the page in a context of its own."""

import base64
import itertools
import re

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image

from tests.browser import DIGITS, draw
from tests.measure import drawn
from tests.photographs import page as photograph_page
from tools.compare.__main__ import main as compare
from visualization import load_metrics_json

PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}
DESKTOP = {"viewport": {"width": 1280, "height": 860}}
ONE_DIGIT_FIRST = [pytest.param(digit, marks=[] if digit == 4 else pytest.mark.long) for digit in DIGITS]


@pytest.fixture
def open_page(browser, server):
    """Opens the page; at the end nothing may have gone wrong in it, and nothing been asked of another machine."""
    contexts, problems = [], []

    def open_it(path="/", address=server, **options):
        context = browser.new_context(**{**DESKTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(180_000)
        page.problems = problems
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        local = (address, "blob:", "data:")
        page.on("request", lambda request: None if request.url.startswith(local) else problems.append(request.url))
        page.goto(address + path)
        return page

    yield open_it
    for context in contexts:
        context.close()
    assert problems == []


def answer(page, digit) -> None:
    """Wait for the answer that ``digit`` is drawn, by all networks."""
    page.wait_for_function("(digit) => document.getElementById('digit').textContent === digit", arg=str(digit))
    page.wait_for_function(
        "(digit) => [...document.querySelectorAll('.guess')].every((guess) => guess.textContent === digit)",
        arg=str(digit),
    )


def is_empty(page) -> bool:
    return page.text_content("#headline") == "Waiting for a drawing" and page.is_disabled("#clear")


@pytest.mark.parametrize(
    "digit", [pytest.param(digit, marks=[] if digit == 4 else pytest.mark.long) for digit in DIGITS]
)
def test_drawn_digits_are_read(open_page, digit):
    page = open_page()
    draw(page, DIGITS[digit])
    answer(page, digit)
    assert page.text_content("#headline") == f"All 3 say {digit}"
    bars = page.locator(".network").first.locator(".bars")
    assert re.match(rf"{digit}: \S", bars.get_attribute("aria-label"))
    pixels = "[...document.getElementById('seen').getContext('2d').getImageData(0, 0, 28, 28).data]"
    white = page.evaluate(f"{pixels}.filter((level, place) => place % 4 === 0 && level > 128).length")
    assert 20 < white < 200


def test_the_answer_follows_the_stroke(open_page):
    page = open_page()
    draw(page, DIGITS[7], pause_ms=80)  # 2 s, so that a busy machine answers often enough
    answer(page, 7)
    times = page.evaluate("performance.getEntriesByName('stroke to answer').map((entry) => entry.duration)")
    assert len(times) >= 5  # while it was drawn, not only at its end


def test_a_touch_is_a_dot_and_what_is_refused_takes_the_answer_away(open_page, tmp_path):
    page = open_page()
    page.click("#canvas")
    page.wait_for_selector(".digit:not(.idle)")
    Image.new("L", (50, 50), 255).save(tmp_path / "blank.png")
    with page.expect_response("**/api/read"):
        page.set_input_files("#upload", tmp_path / "blank.png")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.text_content("#headline") == "Nothing was read"
    page.problems.clear()  # the console notes the 422


def test_undo_clear_and_the_empty_canvas(open_page):
    page = open_page()
    assert is_empty(page)
    draw(page, DIGITS[4])
    answer(page, 4)
    page.click("#undo")
    page.wait_for_function("() => document.getElementById('digit').textContent !== '4'")
    page.click("#undo")
    page.wait_for_selector(".digit.idle")
    assert is_empty(page)
    draw(page, DIGITS[7])
    answer(page, 7)
    page.click("#clear")
    page.wait_for_selector(".digit.idle")
    page.wait_for_timeout(300)
    assert is_empty(page)  # an answer that was under way did not come back
    page.keyboard.press("Control+z")
    answer(page, 7)


def test_by_keyboard_alone(open_page):
    page = open_page()
    page.focus("#canvas")
    for key, times in (("ArrowUp", 15), (" ", 1), ("ArrowDown", 30), (" ", 1)):
        for _ in range(times):
            page.keyboard.press(key)
    answer(page, 1)
    page.keyboard.press("Delete")
    page.wait_for_selector(".digit.idle")


def test_every_control_is_reached_by_tab(open_page):
    page = open_page()
    draw(page, DIGITS[1])
    answer(page, 1)
    page.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.hash"))
    assert {
        "#/draw",
        "#/compare",
        "#/live",
        "#/api",
        "theme",
        "canvas",
        "undo",
        "clear",
        "brush",
        "upload",
        "random",
    } <= reached


def test_a_wider_brush_paints_more(open_page):
    page = open_page()
    pixels = "[...document.getElementById('canvas').getContext('2d').getImageData(0, 0, 2000, 2000).data]"
    ink = f"{pixels}.filter((level, place) => place % 4 === 3 && level > 128).length"
    amounts = []
    for size in ("8", "40"):
        page.fill("#brush", size)
        draw(page, DIGITS[1])
        answer(page, 1)
        page.wait_for_timeout(100)
        amounts.append(page.evaluate(ink))
        page.click("#clear")
    assert amounts[1] > 3 * amounts[0]


@pytest.mark.parametrize(("form", "paper"), [("png", 0), ("jpg", 255), ("webp", 255)])
def test_upload(open_page, test_set, tmp_path, form, paper):
    images, labels = test_set
    canvas = drawn(images[3].numpy(), 2)
    image = Image.new("L", (900, 700), paper)
    image.paste(Image.fromarray(255 - canvas if paper else canvas), (300, 100))
    image.save(tmp_path / f"photo.{form}")
    page = open_page()
    page.set_input_files("#upload", tmp_path / f"photo.{form}")
    answer(page, int(labels[3]))


def test_upload_of_what_is_no_image(open_page, tmp_path):
    (tmp_path / "photo.png").write_text("hello")
    page = open_page()
    page.set_input_files("#upload", tmp_path / "photo.png")
    page.wait_for_selector("#problem:not([hidden])")
    assert page.text_content("#problem") == "photo.png cannot be read as an image."


def test_a_random_test_digit_with_its_label(open_page):
    page = open_page()
    page.click("#random")
    page.wait_for_function("() => /it is labelled \\d/.test(document.getElementById('detail').textContent)")
    page.click("#undo")
    page.wait_for_selector(".digit.idle")


@pytest.mark.parametrize(
    "digit", [pytest.param(digit, marks=[] if digit == 4 else pytest.mark.long) for digit in DIGITS]
)
def test_touch_on_a_phone(open_page, digit):
    page = open_page(**PHONE)
    box = page.locator("#canvas").bounding_box()
    touch = page.context.new_cdp_session(page)
    top = page.evaluate("scrollY")
    for stroke in DIGITS[digit]:
        for place, (x, y) in enumerate(stroke):
            point = {"x": box["x"] + x * box["width"], "y": box["y"] + y * box["height"]}
            kind = "touchMove" if place else "touchStart"
            touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [point]})
        touch.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    answer(page, digit)
    assert page.evaluate("scrollY") == top  # a finger on the paper draws and does not scroll
    assert page.locator("#canvas").bounding_box() == box  # and the answer moves nothing
    seen = page.locator("#headline").bounding_box()
    assert 0 < seen["y"] < 740


@pytest.fixture(scope="module")
def page_of_numbers(test_set, tmp_path_factory):
    """A photo of the first twelve test digits in three lines, and what stands there."""
    images, labels = (part[:12].numpy().reshape(3, 4, *part.shape[1:]) for part in test_set)
    path = tmp_path_factory.mktemp("photo") / "page.jpg"
    path.write_bytes(photograph_page(images, np.random.default_rng(0)))
    return path, ["".join(map(str, line)) for line in labels]


def read(page, path) -> None:
    """Let the page read a picture, until it shows what it shows."""
    page.set_input_files("#upload", path)
    page.wait_for_selector(".box")
    page.wait_for_selector(".digit:not(.idle)")


def seen_by_the_networks(page) -> list[int]:
    levels = "[...document.getElementById('seen').getContext('2d').getImageData(0, 0, 28, 28).data]"
    return page.evaluate(f"{levels}.filter((level, place) => place % 4 === 0)")


def test_a_photo_of_a_page_of_numbers(open_page, server, page_of_numbers):
    path, lines = page_of_numbers
    page = open_page()
    read(page, path)
    asked = page.request.post(f"{server}/api/read", data=path.read_bytes(), headers={"content-type": "image/jpeg"})
    found = asked.json()
    assert page.text_content("#text").split() == found["text"].split() == lines
    assert page.text_content("#found") == "12 digits in 3 lines"
    assert page.locator(".sign").all_text_contents() == list("".join(lines))
    assert page.get_by_role("button", name=re.compile(rf"^Digit 2 of 12: {lines[0][1]}, \d+ %$")).count() == 1
    picture, photo = page.locator("#picture").bounding_box(), found["digits"][6]["box"]
    box, scale = (
        page.locator(".box").nth(6).bounding_box(),
        page.locator("#boxes").bounding_box()["width"] / found["width"],
    )
    assert box["x"] <= picture["x"] + 1 + photo[0] * scale  # the digit lies within its box
    assert box["x"] + box["width"] >= picture["x"] + (photo[0] + photo[2]) * scale
    page.locator(".box").nth(6).click()
    answer(page, lines[1][2])
    assert page.text_content("#detail").startswith("Digit 7 of 12. ")
    assert page.locator(".box").nth(6).get_attribute("aria-pressed") == "true"
    assert seen_by_the_networks(page) == list(base64.b64decode(found["digits"][6]["form"]))
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.click("#copy")
    page.wait_for_selector("#copy >> text=Copied")
    assert page.evaluate("navigator.clipboard.readText()") == found["text"]
    page.click("#back")
    page.wait_for_selector("#canvas")
    assert is_empty(page)


def test_boxes_by_keyboard(open_page, page_of_numbers):
    path, lines = page_of_numbers
    page = open_page()
    read(page, path)
    page.focus("#back")
    page.keyboard.press("Shift+Tab")
    here = "document.activeElement.getAttribute('aria-label')"
    for key, place in (("Home", 1), ("ArrowDown", 5), ("ArrowUp", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("End", 12)):
        page.keyboard.press(key)
        assert page.evaluate(here).startswith(f"Digit {place} of 12: ")
    page.keyboard.press("Enter")
    answer(page, lines[2][3])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "back"  # one stop, and not twelve


def with_doubt(route) -> None:
    """What the API answers, but that every network is unsure and the second digit of a picture too."""
    found = route.fetch().json()
    for part in [*found.get("predictions", {}).values(), *found.get("digits", [])[1:2]]:
        part["unsure"] = True
    route.fulfill(json=found)


def test_unsure_is_said(open_page, page_of_numbers):
    path, lines = page_of_numbers
    page = open_page()
    page.route(re.compile("/api/(predict|read)"), with_doubt)
    draw(page, DIGITS[4])
    page.wait_for_selector("#headline >> text=Unsure, perhaps 4")
    assert page.text_content("#digit") == "?"
    assert page.text_content("#detail") == "All 3 say 4, but it may be no digit."
    assert page.locator(".network .meta").first.text_content().startswith("unsure, ")
    read(page, path)
    unsure = page.locator(".box.unsure")
    assert unsure.text_content() == "?"
    assert unsure.get_attribute("title").startswith(f"Digit 2 of 12: unsure, perhaps {lines[0][1]}, ")
    assert unsure.evaluate("(box) => getComputedStyle(box).borderStyle") == "dashed"
    assert page.locator("#text .unsure").text_content() == lines[0][1]
    assert page.text_content("#found") == "12 digits in 3 lines, 1 unsure"


def test_a_tap_beside_a_small_digit_chooses_it(open_page, page_of_numbers):
    path, lines = page_of_numbers
    page = open_page(**PHONE)
    read(page, path)
    box = page.locator(".box").nth(3).bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] + 12, box["y"] + box["height"] / 2)
    answer(page, lines[0][3])
    signs = page.locator(".sign").evaluate_all("(signs) => signs.map((sign) => sign.getBoundingClientRect().toJSON())")
    inks = page.locator(".box").evaluate_all("(boxes) => boxes.map((box) => box.getBoundingClientRect().toJSON())")
    for place, sign in enumerate(signs):  # an answer covers no other digit
        for other, ink in enumerate(inks):
            apart = ink["right"] <= sign["left"] + 4 or sign["right"] <= ink["left"] + 4
            apart |= ink["bottom"] <= sign["top"] + 4 or sign["bottom"] <= ink["top"] + 4
            assert apart or place == other
    with page.expect_file_chooser() as chooser:
        page.tap("label[for=camera]")
    assert chooser.value.element.get_attribute("capture") == "environment"


def test_a_picture_that_the_browser_cannot_show(open_page, page_of_numbers, tmp_path):
    path, lines = page_of_numbers
    photo = Image.open(path)
    photo.save(tmp_path / "page.tiff")
    page = open_page()
    read(page, tmp_path / "page.tiff")
    assert page.text_content("#text").split() == lines
    assert page.is_visible("#unshown")
    sheet = page.locator("#picture").bounding_box()
    assert sheet["width"] / sheet["height"] == pytest.approx(photo.width / photo.height, rel=0.02)


@pytest.mark.parametrize("way", ["paste", pytest.param("drop", marks=pytest.mark.long)])
def test_a_picture_that_is_pasted_or_dropped(open_page, test_set, tmp_path, way):
    images, labels = test_set
    Image.fromarray(np.pad(drawn(images[3].numpy(), 2), 100)).save(tmp_path / "digit.png")
    page = open_page()
    page.evaluate(
        """([way, encoded]) => {
            const bytes = Uint8Array.from(atob(encoded), (sign) => sign.charCodeAt(0));
            const data = new DataTransfer();
            data.items.add(new File([bytes], "digit.png", { type: "image/png" }));
            const event = way === "paste" ? new ClipboardEvent(way, { clipboardData: data, bubbles: true })
                : new DragEvent(way, { dataTransfer: data, bubbles: true, cancelable: true });
            document.getElementById("canvas").dispatchEvent(event);
        }""",
        [way, base64.b64encode((tmp_path / "digit.png").read_bytes()).decode()],
    )
    answer(page, int(labels[3]))
    assert page.locator(".box").count() == 1
    page.keyboard.press("Control+z")
    page.wait_for_selector(".digit.idle")
    assert page.is_visible("#canvas")


def test_a_drawing_of_two_digits_can_be_read_as_a_picture(open_page):
    page = open_page()
    draw(page, [[(0.5 * x, y) for x, y in stroke] for stroke in DIGITS[4]])
    draw(page, [[(0.5 + 0.5 * x, y) for x, y in stroke] for stroke in DIGITS[7]])
    page.click("#several >> text=Read all 2 digits")
    page.wait_for_selector(".box")
    assert page.text_content("#text") == "47"
    page.click("#back")
    page.wait_for_selector("#several:not([hidden])")
    assert page.text_content("#detail") == "2 digits seen; this is the largest."
    page.click("#undo")
    page.wait_for_selector("#several", state="hidden")


def test_what_the_server_refuses_is_said_in_its_words(open_page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (1400, 2700, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "large.png")
    page = open_page()
    page.set_input_files("#upload", tmp_path / "large.png")
    page.wait_for_selector("#problem >> text=the body is too long; at most 10,485,760 bytes are allowed")
    assert page.get_attribute("#picture", "aria-busy") == "false"
    page.problems.clear()  # the console notes the 413


def test_inside_a_network_on_demand(open_page):
    page = open_page()
    page.click("#inside summary")
    page.wait_for_selector("#inside >> text=Draw a digit first.")
    draw(page, DIGITS[4])
    answer(page, 4)
    page.select_option("#inside select", "mnist_model_3")
    page.wait_for_selector(".looked")
    blocks = page.locator(".inside figcaption").all_text_contents()
    assert blocks[:2] == ["where it looked", "stem.0: 8 channels, 26 x 26"]
    assert blocks[-1] == "block2.4: 10 channels, 6 x 6"
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    assert found.violations_count == 0, found.generate_report()


# each view once; the rest in the long tier
LOOKS_FIRST = [("draw", "light", "phone"), ("compare", "dark", "phone"), ("live", "light", "desktop")]
LOOKS_FIRST += [("api", "dark", "desktop"), ("read", "light", "phone")]
LOOKS = [
    pytest.param(*look, marks=[] if look in LOOKS_FIRST else pytest.mark.long)
    for look in itertools.product(["draw", "read", "compare", "live", "api"], ["light", "dark"], ["phone", "desktop"])
]


@pytest.mark.parametrize(("view", "scheme", "device"), LOOKS)
def test_accessible_and_never_wider_than_the_screen(open_page, page_of_numbers, view, scheme, device):
    page = open_page(
        f"/#/{'draw' if view == 'read' else view}", color_scheme=scheme, **{"phone": PHONE, "desktop": DESKTOP}[device]
    )
    ready = {"compare": "#recall .main-svg", "live": "table", "api": ".endpoint"}
    page.wait_for_selector(ready.get(view, ".network"))
    if view == "read":
        page.route("**/api/read", with_doubt)
        read(page, page_of_numbers[0])
    if view == "draw":
        draw(page, DIGITS[7])
        answer(page, 7)
    found = Axe().run(page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_choice_of_colours_is_kept(open_page):
    page = open_page(color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")
    dark = page.evaluate(ground)
    assert dark != light
    page.reload()
    assert page.evaluate(ground) == dark


def names_in(page) -> list[str]:
    return page.locator("tbody").first.locator("label").all_text_contents()


def test_compare_sorts_and_keeps_the_choice_in_the_address(open_page, server):
    page = open_page("/#/compare")
    page.wait_for_selector("#curves .main-svg")
    page.click("#sort-parameters")
    parameters = page.locator("tbody").first.locator("tr td:nth-child(4)").all_text_contents()
    assert parameters == ["8,650", "7,730", "7,720"]
    page.click("#sort-parameters")
    assert names_in(page) == ["mnist_model_1", "mnist_model_2", "mnist_model_3"]
    assert page.locator(".matrix").count() == 3
    page.uncheck("#choose-mnist_model_2")
    page.wait_for_function("() => document.querySelectorAll('.matrix').length === 2")
    assert page.url == f"{server}/#/compare?runs=mnist_model_1,mnist_model_3"
    again = open_page("/#/compare?runs=mnist_model_1,mnist_model_3")
    again.wait_for_selector("#curves .main-svg")
    assert again.locator(".matrix").count() == 2
    assert not again.is_checked("#choose-mnist_model_2")


def test_compare_draws_what_was_measured(open_page, page_folder):
    page = open_page("/#/compare")
    page.wait_for_selector("#curves .main-svg")
    traces = "document.getElementById('curves').data.map(({ name, y }) => [name, y])"
    for name, y in page.evaluate(traces):
        assert y == load_metrics_json(name, page_folder)["test_acc"]
    page.select_option("#curve", "train_losses")
    page.wait_for_function("() => document.getElementById('curves').data[0].y.length > 1000")
    assert page.evaluate("document.getElementById('curves').layout.yaxis.type") == "log"
    page.uncheck("#log")
    page.wait_for_function("() => document.getElementById('curves').layout.yaxis.type === 'linear'")
    rough = page.evaluate("document.getElementById('curves').data[0].y")
    page.fill("#smooth", "0")
    page.wait_for_function("(before) => document.getElementById('curves').data[0].y[50] !== before", arg=rough[50])
    cases = page.locator(".case")
    assert cases.count() == 24
    page.get_by_role("button", name=re.compile("Show all")).click()
    assert cases.count() > 24


def test_compare_tells_of_a_run_that_is_not_there(browser, server):
    page = browser.new_page()  # its console notes the 404
    page.goto(f"{server}/#/compare?runs=gone")
    page.wait_for_selector("#compare .problem")
    assert page.text_content("#compare .problem").startswith("there is no run gone; there are mnist_model_")
    page.click("text=Show all runs")
    page.wait_for_selector("#curves .main-svg")


def test_the_file_shows_the_same(browser, page_folder, mnist, tmp_path):
    output = tmp_path / "sent.html"
    assert compare(["--output_dir", str(page_folder), "--data_dir", str(mnist), "--output", str(output)]) == 0
    problems = []
    page = browser.new_page()
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on(
        "request",
        lambda request: None if request.url.startswith(("file:", "data:", "blob:")) else problems.append(request.url),
    )
    page.goto(output.as_uri())
    page.wait_for_selector("#recall .main-svg")
    assert page.locator(".matrix").count() == 3
    page.uncheck("#choose-mnist_model_3")
    page.wait_for_function("() => document.querySelectorAll('.matrix').length === 2")
    assert page.url.endswith("#runs=mnist_model_1,mnist_model_2")
    assert problems == []


def test_live_shows_a_real_training(serve, python, open_page, mnist, tmp_path):
    (tmp_path / "outputs").mkdir()
    address, _ = serve("--output_dir", tmp_path)
    page = open_page("/#/live", address=address)
    page.wait_for_selector(".empty")
    training = python("main.py", "--epochs", "50", "--name", "watched", "--data_dir", mnist, "--output_dir", tmp_path)
    card = page.locator("[data-run=watched]")
    card.locator(".badge.running").wait_for()
    card.locator(".main-svg").first.wait_for()
    page.wait_for_function("() => document.querySelector('[data-run=watched] .chart')?.data?.[0].y.length > 2")
    page.wait_for_function("() => /^[\\d,]+$/.test(document.querySelectorAll('[data-run=watched] dd')[4].textContent)")
    facts = dict(zip(card.locator("dt").all_text_contents(), card.locator("dd").all_text_contents(), strict=True))
    assert facts["epoch"] == "1 of 50"
    assert 0 < float(facts["loss"]) < 3
    assert facts["learning rate"] == "0.0100"
    assert re.match(r"\d+ (s|min|h)", facts["time left"])
    assert page.is_visible("#live-mark")
    training.kill()
    card.locator(".badge.crashed").wait_for()
    assert not page.is_visible("#live-mark")
