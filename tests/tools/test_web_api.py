"""The page's API and its safety, against the server that the command starts."""

import http.client
import io
import json
from base64 import b64decode
from itertools import pairwise
from urllib.parse import urlsplit

import numpy as np
import pytest
from forking import SECONDS
from PIL import Image

from common.files import PROJECT_DIR
from image_data.form import MAX_BYTES, to_mnist
from tests.browser import ask, connected
from tests.measure import VARIATIONS, accuracy_of_drawings, drawn, mean_over_variations, placed, png
from tests.photographs import page

NAMES = ["mnist_model_1", "mnist_model_2", "mnist_model_3"]
DRAWING = png(placed(np.full((200, 40), 255, dtype=np.uint8)))


def request(address, method="GET", path="/api/predict", body=None, **headers) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=SECONDS)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, {name.lower(): value for name, value in response.getheaders()}, response.read()
    finally:
        connection.close()


def detail(body: bytes) -> str:
    found = json.loads(body)["detail"]
    assert isinstance(found, str)
    assert "Traceback" not in found
    return found


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(5))
def test_an_answer_to_a_real_digit(server, test_set, index):
    images, labels = test_set
    canvas = placed(drawn(images[index].numpy()))
    with connected(server) as connection:
        answer = ask(connection, png(canvas))
    assert list(answer["predictions"]) == NAMES
    for prediction in answer["predictions"].values():
        assert prediction["digit"] == labels[index] == int(np.argmax(prediction["probabilities"]))
        assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert answer["input"] == to_mnist(canvas).flatten().tolist()


def test_raw_bytes_are_seen_as_they_are(server, test_set):
    images, labels = test_set
    raw = images[0].numpy().tobytes()
    with connected(server) as connection:
        answer = ask(connection, raw, "application/octet-stream")
    assert bytes(answer["input"]) == raw
    assert {prediction["digit"] for prediction in answer["predictions"].values()} == {int(labels[0])}


@pytest.mark.parametrize(
    ("digits", "best", "worst"), [(10, 98.5, 90), pytest.param(1000, 98.5, 97, marks=pytest.mark.long)]
)
def test_digits_drawn_large(server, mnist, digits, best, worst):
    """2 s: ten digits in seven variations, over HTTP."""
    found = accuracy_of_drawings(server, digits, str(mnist))
    assert list(found) == list(VARIATIONS)
    assert max(mean_over_variations(found).values()) >= best
    assert min(min(row.values()) for row in found.values()) >= worst


@pytest.mark.parametrize("name", ["", "?name=mnist_model_2"])
def test_a_page_of_numbers(server, test_set, name):
    images, labels = test_set
    rows = [[images[3 * line + place].numpy() for place in range(3)] for line in range(2)]
    body = page(rows, np.random.default_rng(3))
    status, _, found = request(server, "POST", f"/api/read{name}", body, Content_Type="image/jpeg")
    assert status == 200
    answer = json.loads(found)
    truth = "".join(str(int(label)) for label in labels[:6])
    assert answer["text"] == f"{truth[:3]}\n{truth[3:]}"
    assert answer["name"] == (name.partition("=")[2] or NAMES[0])
    assert [digit["line"] for digit in answer["digits"]] == [0] * 3 + [1] * 3
    with Image.open(io.BytesIO(body)) as image:
        assert (answer["width"], answer["height"]) == image.size
    for digit, after in pairwise(answer["digits"][:3]):
        left, _, width, height = digit["box"]
        assert left + width < after["box"][0]
        assert 40 < height < 150
        raw = b64decode(digit["form"])
        with connected(server) as connection:
            again = ask(connection, raw, "application/octet-stream")["predictions"][answer["name"]]
        assert (again["digit"], max(again["probabilities"])) == (digit["digit"], digit["confidence"])
    with connected(server) as connection:
        assert ask(connection, body, "image/jpeg")["count"] == 6


def test_reading_what_is_not_there(server):
    found = [
        request(server, "POST", f"/api/read{query}", body, Content_Type=kind)
        for query, body, kind in (
            ("", png(np.full((90, 90), 255, dtype=np.uint8)), "image/png"),
            ("?name=nobody", DRAWING, "image/png"),
            ("", bytes(784), "application/octet-stream"),
        )
    ]
    assert [status for status, _, _ in found] == [422, 404, 415]
    assert "there is no network nobody for drawings" in detail(found[1][2])


def test_models_and_runs(server):
    _, _, body = request(server, path="/api/models")
    assert [(model["name"], model["parameters"]) for model in json.loads(body)] == list(
        zip(NAMES, [7720, 7730, 8650], strict=True)
    )
    _, _, body = request(server, path="/api/runs")
    assert sorted(run["name"] for run in json.loads(body)) == NAMES
    assert all(run["status"] == "finished" and run["accuracy"] > 99.4 for run in json.loads(body))


def test_comparison(server):
    status, _, body = request(server, path="/api/comparison?run=mnist_model_1&run=mnist_model_3")
    assert status == 200
    assert sorted(json.loads(body)["curves"]) == ["mnist_model_1", "mnist_model_3"]
    status, _, body = request(server, path="/api/comparison?run=../../etc/passwd")
    assert status == 404
    assert "there is no run ../../etc/passwd" in detail(body)


def test_test_digits(server, test_set):
    images, labels = test_set
    found = json.loads(request(server, path="/api/digits/7")[2])
    assert found == {"index": 7, "label": int(labels[7]), "pixels": images[7].flatten().tolist()}
    drawn_at_random = [json.loads(request(server, path="/api/digits/random")[2]) for _ in range(5)]
    assert len({digit["index"] for digit in drawn_at_random}) > 1
    assert all(digit["label"] == labels[digit["index"]] for digit in drawn_at_random)
    assert request(server, path="/api/digits/10000")[0] == 404
    assert request(server, path="/api/digits/x")[0] == 422


def test_the_page_s_python_example(server, test_set, tmp_path, monkeypatch, capsys):
    page = (PROJECT_DIR / "docs" / "page.md").read_text(encoding="utf-8")
    script = page.partition("```python\nimport json\nimport urllib.request\n")[2].partition("```")[0]
    assert script
    Image.fromarray(255 - drawn(test_set[0][0].numpy())).save(tmp_path / "seven.png")
    script = "import json\nimport urllib.request\n" + script.replace("http://127.0.0.1:8000", server)
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    assert capsys.readouterr().out.split()[-1] == "7"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        ("image/png", png(np.zeros((280, 280), dtype=np.uint8)), 422, "nothing is drawn"),
        ("application/octet-stream", bytes(784), 422, "nothing is drawn"),
        ("application/octet-stream", bytes(783), 422, "must be 784"),
        ("image/png", b"", 422, "no PNG, JPEG, WEBP, BMP, GIF or TIFF image"),
        ("image/png", DRAWING[:60], 422, "damaged"),
        ("image/png", b"GIF89a" + bytes(100), 422, "no PNG"),
        ("image/jpeg", bytes(MAX_BYTES + 1), 413, "too long"),
        ("image/svg+xml", DRAWING, 415, "'image/svg+xml' is not allowed"),
        ("application/json", b"{}", 415, "is not allowed"),
        ("", DRAWING, 415, "is not allowed"),
    ],
)
def test_bad_bodies(server, content_type, body, status, message):
    found, headers, answer = request(server, "POST", body=body, Content_Type=content_type)
    assert found == status
    assert headers["content-type"] == "application/json"
    assert message in detail(answer)


def test_a_decompression_bomb(server):
    bomb = png(np.zeros((12_000, 12_000), dtype=np.uint8))
    assert len(bomb) < MAX_BYTES
    status, _, body = request(server, "POST", body=bomb, Content_Type="image/png")
    assert status == 413
    assert "at most 25,000,000" in detail(body)


def test_a_body_without_a_declared_length_is_cut_off(server):
    def endless():
        for _ in range(2 * MAX_BYTES >> 20):
            yield bytes(1 << 20)

    connection = http.client.HTTPConnection(urlsplit(server).netloc, timeout=60)
    try:
        connection.request("POST", "/api/predict", endless(), {"Content-Type": "image/png"}, encode_chunked=True)
        status = connection.getresponse().status
    except (ConnectionResetError, BrokenPipeError):
        status = 413  # it had hung up before all was sent
    assert status == 413
    connection.close()
    assert request(server, path="/api/models")[0] == 200


@pytest.mark.parametrize("path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/etc/passwd"])
def test_no_path_leads_out(server, path):
    assert request(server, path=path)[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "10.1.2.3", "", "[::1", "a b"]
)
def test_foreign_hosts_are_refused(server, host):
    status, _, body = request(server, path="/api/models", Host=host)
    assert status == 403
    assert detail(body) == "the Host header names another machine; --allow_host lets a name in"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:9", "[::1]:8000", "LOCALHOST:80"])
def test_loopback_by_any_name(server, host):
    assert request(server, path="/api/models", Host=host)[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://[evil"}, 403),
        ({"Origin": "http://{host}"}, 200),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}, 200),
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}, 200),
    ],
)
def test_other_sites_are_refused(server, headers, status):
    host = urlsplit(server).netloc
    filled = {name: value.format(host=host) for name, value in headers.items()}
    assert request(server, path="/api/models", **filled)[0] == status


@pytest.mark.parametrize("path", ["/", "/api/models", "/static/page.js", "/nothing"])
def test_security_headers(server, path):
    _, headers, _ = request(server, path=path)
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == "'self'"
    assert "unsafe" not in headers["content-security-policy"]
    assert policy["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert "server" not in headers


def test_the_page_has_nothing_inline_and_nothing_from_elsewhere(server):
    static = PROJECT_DIR / "tools" / "web" / "static"
    html = (static / "index.html").read_text(encoding="utf-8")
    assert "style=" not in html
    assert "<style" not in html
    assert all(part.startswith((' type="module" src=', "</")) for part in html.split("<script")[1:])
    for path in static.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text
        assert "https:" not in text


# --- inside a network -------------------------------------------------------------------------------------------------


def test_what_speaks_for_an_answer_and_what_the_blocks_leave(server, test_set):
    images, labels = test_set
    raw = images[0].numpy()
    path = "/api/inside?network=mnist_model_1"
    status, _, body = request(server, "POST", path, raw.tobytes(), content_type="application/octet-stream")
    assert status == 200, body
    found = json.loads(body)
    assert found["digit"] == labels[0]
    assert [len(block["channels"]) for block in found["blocks"]] == [8, 16, 10, 16, 16, 10, 10]
    assert [len(block["channels"][0]) ** 0.5 for block in found["blocks"]] == [26, 24, 12, 10, 8, 6, 6]
    levels = [level for block in found["blocks"] for channel in block["channels"] for level in channel]
    assert (min(levels), max(levels)) == (0, 255)
    saliency = np.array(found["saliency"])
    assert np.abs(saliency).max() == pytest.approx(1)
    assert saliency[raw.flatten() > 0].sum() > 0  # the ink spoke for it
    assert np.abs(saliency[raw.flatten() == 0]).max() == 0  # the paper is what it is held against


@pytest.mark.parametrize(
    ("query", "kind", "body", "status"),
    [
        ("?network=none", "application/octet-stream", bytes([9]) * 784, 404),
        ("?network=mnist_model_1", "application/octet-stream", bytes(784), 422),
        ("?network=mnist_model_1", "application/octet-stream", bytes(785), 413),
        ("?network=mnist_model_1", "image/png", DRAWING, 415),
        ("", "application/octet-stream", bytes([9]) * 784, 422),
    ],
)
def test_what_cannot_be_looked_into_is_refused(server, query, kind, body, status):
    found, _, said = request(server, "POST", f"/api/inside{query}", body, content_type=kind)
    assert found == status
    assert detail(said)
