"""The page's server under load, held against its own description, and as a command."""

import json
import shutil
import socket
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from conftest import eventually
from hypothesis import given, settings
from hypothesis import strategies as st
from test_web_api import DRAWING, detail, request

from tests.browser import ask, connected, serving
from tests.measure import placed, png
from tools.web import __main__ as command
from tools.web.server import LOOK_SECONDS


@pytest.mark.parametrize("questions", [1, pytest.param(6, marks=pytest.mark.long)])
def test_a_crowd_is_answered(server, questions):
    def client(number: int) -> int:
        with connected(server) as connection:
            return len([ask(connection, DRAWING) for _ in range(questions)])

    with ThreadPoolExecutor(50) as pool:
        assert sum(pool.map(client, range(50))) == 50 * questions


@pytest.mark.long
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

    def is_let_in() -> bool:
        with socket.create_connection((host, int(port)), timeout=30) as watcher:
            watcher.sendall(f"GET /api/live HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            return watcher.recv(64).split()[1] == b"200"

    eventually(is_let_in)  # those that closed their page have left


# --- anything at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bodies", [15, pytest.param(60, marks=pytest.mark.long)])
def test_any_body(server, bodies):
    types = ["image/png", "image/jpeg", "image/webp", "application/octet-stream", "text/plain", "*"]

    @settings(max_examples=bodies)
    @given(
        body=st.binary(max_size=3000) | st.binary(max_size=200).map(lambda noise: DRAWING[:-100] + noise),
        content_type=st.sampled_from(types),
    )
    def is_answered(body, content_type):
        status, _, answer = request(server, "POST", body=body, Content_Type=content_type)
        assert status in (200, 413, 415, 422)
        if status == 200:
            assert len(json.loads(answer)["input"]) == 784
        else:
            assert detail(answer)

    is_answered()


@pytest.mark.long
def test_the_api_is_as_it_is_described(server):
    """Schemathesis makes requests from the description and holds the answers against it."""
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    conformance = checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance
    schema = schemathesis.openapi.from_url(f"{server}/openapi.json").exclude(path="/api/live")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) == 8
    for operation in operations:

        @settings(max_examples=15)
        @given(case=operation.as_strategy())
        def holds(case):
            response = case.call(base_url=server)
            assert response.status_code < 500
            case.validate_response(response, checks=[not_a_server_error, *conformance])

        holds()


# --- the command ------------------------------------------------------------------------------------------------------


def fails(arguments: list[str], capsys) -> str:
    """The one line of a mistake."""
    with pytest.raises(SystemExit) as caught:
        command.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_port_that_is_taken(server, capsys):
    port = urlsplit(server).port
    error = fails(["--port", str(port)], capsys)
    assert f"port: {port} is taken; the next free one: --port " in error
    assert int(error.split()[-1]) > port


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--port 70000", "port: 70000 is not allowed"),
        ("--port x", "invalid int value"),
        ("--host no.such.host.invalid", "is no address of this machine"),
        ("--host 203.0.113.7", "cannot listen on 203.0.113.7"),
    ],
)
def test_wrong_arguments(flags, message, capsys):
    assert message in fails(flags.split(), capsys)


def test_listening_to_the_network_still_refuses_other_sites(serve):
    address, _ = serve("--host", "0.0.0.0", "--allow_host", "Name.local")
    local = address.replace("0.0.0.0", "127.0.0.1")
    assert request(local, path="/api/models", Host="192.168.1.20:8000")[0] == 200
    assert request(local, path="/api/models", Host="name.local:8000")[0] == 200
    assert request(local, path="/api/models", Host="evil.example")[0] == 403
    assert request(local, path="/api/models", Origin="http://evil.example")[0] == 403


def test_without_networks_or_data(tmp_path, serve):
    (tmp_path / "outputs").mkdir()
    address, _ = serve("--output_dir", tmp_path, "--data_dir", tmp_path)
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


def test_ensembles_of_any_name_answer_and_their_members_do_not(page_folder, tmp_path, serve):
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
    address, _ = serve("--output_dir", tmp_path)
    with connected(address) as connection:
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
        time.sleep(2 * LOOK_SECONDS)
        assert "pair" not in ask(connection, DRAWING)["predictions"]  # those weights are another network's
        compared = json.loads(request(address, path="/api/comparison?run=fifteen")[2])
        commands = [entry["command"] for entry in compared["missing"]]
        assert commands == [f"python -m tools.evaluate --name fifteen --output_dir {tmp_path}"]


def test_a_run_whose_settings_are_missing_is_left_out_of_the_comparison(page_folder, tmp_path, serve):
    (tmp_path / "outputs").mkdir()
    copy_run(page_folder, "mnist_model_1", tmp_path, "whole")
    metrics = json.loads((tmp_path / "outputs" / "whole_metrics.json").read_text())
    metrics["config"]["batch_size"] = 0
    (tmp_path / "outputs" / "broken_metrics.json").write_text(json.dumps(metrics | {"name": "broken"}))
    address, _ = serve("--output_dir", tmp_path)
    status, _, body = request(address, path="/api/comparison")
    assert status == 200
    assert list(json.loads(body)["curves"]) == ["whole"]
    assert "the metrics of broken are not as the schema says" in json.loads(body)["problems"][0]
    with urllib.request.urlopen(f"{address}/api/live", timeout=30) as stream:
        assert stream.readline().startswith(b"event: run")


def test_it_ends_when_it_is_asked_to(page_folder):
    """4 s: as ``python -m tools.web`` starts it, not forked."""
    with serving("--output_dir", page_folder) as (address, pid):
        watching = urllib.request.urlopen(f"{address}/api/live", timeout=30)
        assert watching.readline().startswith(b"event: run")
        process = psutil.Process(pid)
        process.terminate()
        process.wait(60)  # it gives its watchers two seconds


def test_a_new_run_answers_without_a_restart(page_folder, tmp_path, serve):
    (tmp_path / "outputs").mkdir()
    address, _ = serve("--output_dir", tmp_path)
    copy_run(page_folder, "mnist_model_1", tmp_path, "trial")
    with connected(address) as connection:
        assert list(ask(connection, DRAWING)["predictions"]) == ["trial"]
