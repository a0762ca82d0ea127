"""The page's API and its safety, against the server that the command starts."""

import http.client
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks as openapi_checks

from common.files import PROJECT_DIR
from data_utils import load_images
from image_data.form import MAX_BYTES, to_mnist
from tools.browser import ask, connected, serving
from tools.web.measure import VARIATIONS, accuracy_of_drawings, drawn, mean_over_variations, placed, png

CHECKS = [
    not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_schema_conformance,
]
NAMES = ["mnist_model_1", "mnist_model_2", "mnist_model_3"]
DRAWING = png(placed(np.full((200, 40), 255, dtype=np.uint8)))


def request(address, method="GET", path="/api/predict", body=None, **headers) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
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
def test_an_answer_to_a_real_digit(server, mnist, index):
    images, labels = load_images(mnist, train=False)
    canvas = placed(drawn(images[index].numpy()))
    with connected(server) as connection:
        answer = ask(connection, png(canvas))
    assert list(answer["predictions"]) == NAMES
    for prediction in answer["predictions"].values():
        assert prediction["digit"] == labels[index] == int(np.argmax(prediction["probabilities"]))
        assert sum(prediction["probabilities"]) == pytest.approx(1, abs=1e-4)
    assert answer["input"] == to_mnist(canvas).flatten().tolist()


def test_raw_bytes_are_seen_as_they_are(server, mnist):
    images, labels = load_images(mnist, train=False)
    raw = images[0].numpy().tobytes()
    with connected(server) as connection:
        answer = ask(connection, raw, "application/octet-stream")
    assert bytes(answer["input"]) == raw
    assert {prediction["digit"] for prediction in answer["predictions"].values()} == {int(labels[0])}


def test_1000_digits_drawn_large(server, mnist):
    found = accuracy_of_drawings(server, 1000, str(mnist))
    assert list(found) == list(VARIATIONS)
    assert max(mean_over_variations(found).values()) >= 98.5
    assert min(min(row.values()) for row in found.values()) >= 97


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


def test_test_digits(server, mnist):
    images, labels = load_images(mnist, train=False)
    found = json.loads(request(server, path="/api/digits/7")[2])
    assert found == {"index": 7, "label": int(labels[7]), "pixels": images[7].flatten().tolist()}
    drawn_at_random = [json.loads(request(server, path="/api/digits/random")[2]) for _ in range(5)]
    assert len({digit["index"] for digit in drawn_at_random}) > 1
    assert all(digit["label"] == labels[digit["index"]] for digit in drawn_at_random)
    assert request(server, path="/api/digits/10000")[0] == 404
    assert request(server, path="/api/digits/x")[0] == 422


def test_the_page_s_python_example(server, mnist, tmp_path):
    page = (PROJECT_DIR / "docs" / "page.md").read_text(encoding="utf-8")
    script = page.partition("```python\nimport json\nimport urllib.request\n")[2].partition("```")[0]
    assert script
    Image.fromarray(255 - drawn(load_images(mnist, train=False)[0][0].numpy())).save(tmp_path / "seven.png")
    script = "import json\nimport urllib.request\n" + script.replace("http://127.0.0.1:8000", server)
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "7"


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content_type", "body", "status", "message"),
    [
        ("image/png", png(np.zeros((280, 280), dtype=np.uint8)), 422, "nothing is drawn"),
        ("application/octet-stream", bytes(784), 422, "nothing is drawn"),
        ("application/octet-stream", bytes(783), 422, "must be 784"),
        ("image/png", b"", 422, "no PNG, JPEG or WEBP image"),
        ("image/png", DRAWING[:60], 422, "damaged"),
        ("image/png", b"GIF89a" + bytes(100), 422, "no PNG"),
        ("image/jpeg", bytes(MAX_BYTES + 1), 413, "too long"),
        ("image/gif", DRAWING, 415, "'image/gif' is not allowed"),
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
    assert detail(body) == "the Host header names another machine"


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


# --- under load -------------------------------------------------------------------------------------------------------


def test_a_crowd_is_answered(server):
    def client(number: int) -> int:
        with connected(server) as connection:
            return len([ask(connection, DRAWING) for _ in range(6)])

    with ThreadPoolExecutor(50) as pool:
        assert sum(pool.map(client, range(50))) == 300


def test_a_flood_is_sent_away_and_the_server_goes_on(server):
    large = png(np.kron(placed(np.full((200, 40), 255, dtype=np.uint8)), np.ones((15, 15), dtype=np.uint8)))
    together = threading.Barrier(160)

    def client(number: int) -> int:
        together.wait(60)
        return request(server, "POST", body=large, Content_Type="image/png")[0]

    with ThreadPoolExecutor(160) as pool:
        statuses = set(pool.map(client, range(160)))
    assert 503 in statuses
    assert statuses <= {200, 503}
    assert request(server, "POST", body=DRAWING, Content_Type="image/png")[0] == 200


def test_watching_is_limited(server):
    host, port = urlsplit(server).netloc.split(":")
    sockets = []
    try:
        statuses = []
        for _ in range(33):
            watcher = socket.create_connection((host, int(port)), timeout=30)
            sockets.append(watcher)
            watcher.sendall(f"GET /api/live HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            statuses.append(int(watcher.recv(64).split()[1]))
        assert statuses == [200] * 32 + [503]
    finally:
        for watcher in sockets:
            watcher.close()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:  # those that closed their page have left
        with socket.create_connection((host, int(port)), timeout=30) as watcher:
            watcher.sendall(f"GET /api/live HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            if watcher.recv(64).split()[1] == b"200":
                return
        time.sleep(0.2)
    pytest.fail("nobody was let in after all had left")


# --- anything at all --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.binary(max_size=3000) | st.binary(max_size=200).map(lambda noise: DRAWING[:-100] + noise),
    content_type=st.sampled_from(
        ["image/png", "image/jpeg", "image/webp", "application/octet-stream", "text/plain", "*"]
    ),
)
def test_any_body(server, body, content_type):
    status, _, answer = request(server, "POST", body=body, Content_Type=content_type)
    assert status in (200, 413, 415, 422)
    if status == 200:
        assert len(json.loads(answer)["input"]) == 784
    else:
        assert detail(answer)


def test_the_api_is_as_it_is_described(server):
    """Schemathesis makes requests from the description and holds the answers against it."""
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json").exclude(path="/api/live")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 6
    for operation in operations:

        @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy())
        def holds(case):
            response = case.call(base_url=server)
            assert response.status_code < 500
            case.validate_response(response, checks=CHECKS)

        holds()


# --- the command ------------------------------------------------------------------------------------------------------


def test_a_port_that_is_taken(server):
    port = urlsplit(server).port
    done = subprocess.run(
        [sys.executable, "-m", "tools.web", "--port", str(port)],
        cwd=PROJECT_DIR,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"port: {port} is taken; the next free one: --port " in done.stderr
    assert int(done.stderr.split()[-1]) > port


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "port: 70000 is not allowed"),
        ("--port x", "invalid int value"),
        ("--host no.such.host.invalid", "is no address of this machine"),
        ("--host 203.0.113.7", "cannot listen on 203.0.113.7"),
    ],
)
def test_wrong_arguments(flags, message):
    command = [sys.executable, "-m", "tools.web", *flags.split()]
    done = subprocess.run(command, cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_listening_to_the_network_still_refuses_other_sites():
    with serving("--host", "0.0.0.0") as (address, _):
        local = address.replace("0.0.0.0", "127.0.0.1")
        assert request(local, path="/api/models", Host="192.168.1.20:8000")[0] == 200
        assert request(local, path="/api/models", Host="evil.example")[0] == 403
        assert request(local, path="/api/models", Origin="http://evil.example")[0] == 403


def test_without_networks_or_data(tmp_path):
    (tmp_path / "outputs").mkdir()
    with serving("--output_dir", tmp_path, "--data_dir", tmp_path) as (address, _):
        assert json.loads(request(address, path="/api/models")[2]) == []
        status, _, body = request(address, "POST", body=DRAWING, Content_Type="image/png")
        assert (status, detail(body)) == (503, "there is no trained network; train one: python main.py")
        status, _, body = request(address, path="/api/digits/random")
        assert status == 404
        assert "python main.py --epochs 1" in detail(body)
        assert json.loads(request(address, path="/api/comparison")[2])["rows"] == []


def copy_run(folder, name, to, as_name):
    for ending in ("_metrics.json", "_params.pth"):
        shutil.copy(folder / "outputs" / f"{name}{ending}", to / "outputs" / f"{as_name}{ending}")


def test_ensembles_of_any_name_answer_and_their_members_do_not(page_folder, tmp_path):
    (tmp_path / "outputs").mkdir()
    members = [f"fifteen_model_1_seed_{seed}" for seed in range(1, 14)]
    for name in ("mnist_model_1", *members):
        copy_run(page_folder, "mnist_model_1", tmp_path, name)
    copy_run(page_folder, "mnist_model_3", tmp_path, "mnist_model_3")
    description = {"schema": 1, "kind": "ensemble", "method": "soft", "temperature": 1.0, "accuracy": 99.6}
    for name, voters, models in (
        ("fifteen", members, ["1"] * 13),
        ("pair", ["mnist_model_1", "mnist_model_3"], ["1", "3"]),
    ):
        of_one = {"name": name, "members": voters, "models": models, "weights": [1 / len(voters)] * len(voters)}
        whole = {**description, **of_one, "parameters": 7720 * len(voters)}
        (tmp_path / "outputs" / f"{name}.json").write_text(json.dumps(whole))
    with serving("--output_dir", tmp_path) as (address, _), connected(address) as connection:
        models = json.loads(request(address, path="/api/models")[2])
        kinds = {model["name"]: model["kind"] for model in models}
        assert kinds == {
            "fifteen": "ensemble",
            "pair": "ensemble",
            "mnist_model_1": "network",
            "mnist_model_3": "network",
        }
        answers = ask(connection, DRAWING)["predictions"]
        assert answers.keys() == kinds.keys()
        alone = [answers[name]["probabilities"] for name in ("mnist_model_1", "mnist_model_3")]
        assert answers["fifteen"]["probabilities"] == pytest.approx(alone[0], abs=1e-5)
        assert answers["pair"]["probabilities"] == pytest.approx(np.mean(alone, axis=0), abs=1e-5)
        # members that are trained again vote with their new weights
        copy_run(page_folder, "mnist_model_2", tmp_path, "mnist_model_3")
        assert "pair" not in ask(connection, DRAWING)["predictions"]  # those weights are another network's
        compared = json.loads(request(address, path="/api/comparison?run=fifteen")[2])
        commands = [entry["command"] for entry in compared["missing"]]
        assert commands == [f"python -m tools.evaluate --ensemble fifteen --output_dir {tmp_path}"]


def test_a_run_whose_settings_are_missing_is_left_out_of_the_comparison(page_folder, tmp_path):
    (tmp_path / "outputs").mkdir()
    copy_run(page_folder, "mnist_model_1", tmp_path, "whole")
    metrics = json.loads((tmp_path / "outputs" / "whole_metrics.json").read_text())
    metrics["config"]["batch_size"] = 0
    (tmp_path / "outputs" / "broken_metrics.json").write_text(json.dumps(metrics | {"name": "broken"}))
    with serving("--output_dir", tmp_path) as (address, _):
        status, _, body = request(address, path="/api/comparison")
        assert status == 200
        assert list(json.loads(body)["curves"]) == ["whole"]
        assert "the metrics of broken are not as the schema says" in json.loads(body)["problems"][0]
        with urllib.request.urlopen(f"{address}/api/live", timeout=30) as stream:
            assert stream.readline().startswith(b"event: run")


def test_it_ends_when_it_is_asked_to(page_folder):
    with serving("--output_dir", page_folder) as (address, pid):
        watching = urllib.request.urlopen(f"{address}/api/live", timeout=30)
        assert watching.readline().startswith(b"event: run")
        process = psutil.Process(pid)
        began = time.monotonic()
        process.terminate()
        process.wait(20)
        assert time.monotonic() - began < 10


def test_a_new_run_answers_without_a_restart(page_folder, tmp_path):
    (tmp_path / "outputs").mkdir()
    with serving("--output_dir", tmp_path) as (address, _):
        copy_run(page_folder, "mnist_model_1", tmp_path, "trial")
        with connected(address) as connection:
            assert list(ask(connection, DRAWING)["predictions"]) == ["trial"]
