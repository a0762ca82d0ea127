"""README, CONTRIBUTING and docs: their Python runs, their commands parse, their links lead somewhere."""

import argparse
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

import model_strategy
from common.files import PROJECT_DIR
from training.config import TrainConfig
from visualization import load_metrics_json

README = PROJECT_DIR / "README.md"
PAGES = [README, PROJECT_DIR / "CONTRIBUTING.md", *sorted((PROJECT_DIR / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# Python that needs what another test has: a server, exported files, a study.
RUN_ELSEWHERE = {
    ("page.md", "import json"): "tests/tools/test_web_api.py",
    ("export.md", "import numpy"): "tests/tools/test_export.py",
    ("export.md", "import torch"): "tests/tools/test_export.py",
    ("tune.md", "# my_tuning.py"): "tests/tools/test_tune.py",
}
# What a script of one's own takes is what the command behind it takes.
SCRIPTS = {"main.py": "main", "my_network.py": "main", "my_tuning.py": "tools.tune"}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [block for language, block in FENCE.findall(read(page)) if language in languages]


def prose(page: Path) -> str:
    """Without what is fenced."""
    return FENCE.sub("", read(page))


# ---------------------------------------------------------------------------------------------------------------------
# Python
# ---------------------------------------------------------------------------------------------------------------------


def python_to_run() -> list[Any]:
    found = [(page, block) for page in PAGES for block in blocks(page, "python")]
    return [
        pytest.param(block, id=f"{page.name}: {block.splitlines()[0]}")
        for page, block in found
        if (page.name, block.splitlines()[0]) not in RUN_ELSEWHERE and not block.startswith("# my_network.py\n")
    ]


@pytest.mark.parametrize("script", python_to_run())
def test_python_runs(script, tmp_path, monkeypatch, capsys):
    """Where a script prints, a number in its last line's comment is what it prints."""
    picture = Image.new("L", (280, 280), "white")
    ImageDraw.Draw(picture).line([(80, 80), (190, 75), (140, 160), (120, 220)], fill="black", width=22, joint="curve")
    picture.save(tmp_path / "seven.png")
    monkeypatch.chdir(tmp_path)
    exec(script, {})
    expected = re.search(r"# (\d+)$", script.strip())
    if expected:
        assert capsys.readouterr().out.strip() == expected[1]


def test_a_network_of_ones_own(own_network, tiny_mnist, tmp_path, monkeypatch):
    monkeypatch.setattr(model_strategy, "_REGISTRY", dict(model_strategy._REGISTRY))
    flags = ["--model", "linear", "--epochs", "1", "--data_dir", str(tiny_mnist), "--output_dir", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [str(own_network), *flags])
    with pytest.raises(SystemExit) as done:
        runpy.run_path(str(own_network), run_name="__main__")
    assert done.value.code == 0
    assert load_metrics_json("mnist_model_linear", tmp_path)["status"] == "finished"


@pytest.mark.parametrize(("page", "first_line"), RUN_ELSEWHERE)
def test_the_rest_is_run_elsewhere(page, first_line):
    assert any(block.startswith(first_line) for block in blocks(PROJECT_DIR / "docs" / page, "python"))
    assert page in read(PROJECT_DIR / RUN_ELSEWHERE[page, first_line])


# ---------------------------------------------------------------------------------------------------------------------
# commands
# ---------------------------------------------------------------------------------------------------------------------


class ParsedError(BaseException):
    """Ends a command as soon as its arguments are read; no command takes it for one of its own errors."""


def commands(page: Path) -> list[list[str]]:
    """The words of every command that is shown, without what follows it in a pipe or after &&."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    lines += [line[2:] for block in blocks(page, "") for line in block.splitlines() if line.startswith("$ ")]
    lines += re.findall(r"`((?:python|make|torchrun) [^`]+)`", prose(page))
    return [list(words(line)) for line in lines if words(line)]


def words(line: str) -> list[str]:
    found = shlex.split(line, comments=True)
    return found[: next((place for place, word in enumerate(found) if word in ("&&", "||", "|", ";")), len(found))]


def made(target: str, arguments: str) -> list[list[str]]:
    """The words of what make runs for ``target``."""
    recipe = re.search(rf"^{target}:.*\n((?:\t.*\n)*)", read(PROJECT_DIR / "Makefile"), re.MULTILINE)
    assert recipe, f"no target {target}"
    lines = recipe[1].replace("$(ARGS)", arguments).replace("$$model", "1")
    found = re.findall(r"\$\((?:BIN\)/python|PYTHON\)) ([^|;\n]*)", lines)
    return [["python", *shlex.split(line)] for line in found]


def is_ours(command: list[str]) -> bool:
    return command[0] == "python" and command[1] != "-c" and command[1:3] != ["-m", "pytest"]


def check(command: list[str]) -> None:
    """Have the command's own parser read its words; ``only_parsing`` ends it there."""
    if command[0] == "make":
        settings = dict(word.split("=", 1) for word in command[1:] if "=" in word)
        for target in (word for word in command[1:] if "=" not in word):
            for inner in filter(is_ours, made(target, settings.get("ARGS", ""))):
                check(inner)
        return
    if command[0] == "torchrun":
        command = ["python", *command[command.index("main.py") :]]
    if not is_ours(command):
        return
    module, arguments = (command[2], command[3:]) if command[1] == "-m" else (SCRIPTS[command[1]], command[2:])
    spec = importlib.util.find_spec(module)
    assert spec, f"no module {module}"
    if not arguments:  # named in the text
        return
    with pytest.raises((ParsedError, SystemExit)) as ended:
        import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main(arguments)
    assert isinstance(ended.value, ParsedError) or ended.value.code == 0, shlex.join(command)


@pytest.fixture
def only_parsing(monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def stop_there(parser: argparse.ArgumentParser, *arguments: Any) -> argparse.Namespace:
        parse(parser, *arguments)
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop_there)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page, only_parsing):
    for command in commands(page):
        check(command)


@pytest.mark.parametrize(
    "line",
    [
        "As `python main.py --modle 3` does.",
        "```\n$ make web ARGS='--hots 0.0.0.0'\n```",
        "```bash\nmake trian\n```",
        "```bash\npython -m tools.export --model 7   # there are three\n```",
        "```bash\ntorchrun --nnodes=2 main.py --epoch 3\n```",
        "Try `python -m tools.predcit`.",
    ],
)
def test_a_wrong_command_is_found(line, tmp_path, only_parsing):
    page = tmp_path / "page.md"
    page.write_text(f"{line}\n")
    (command,) = commands(page)
    with pytest.raises(AssertionError):
        check(command)


def test_every_setting_is_explained():
    text = read(PROJECT_DIR / "docs" / "train.md")
    (example,) = blocks(PROJECT_DIR / "docs" / "train.md", "toml")
    settings = tomllib.loads(example)
    TrainConfig(**settings)
    for setting in fields(TrainConfig):
        is_flag = setting.metadata.get("flag", True)
        assert f"| `--{setting.name}" in text if is_flag else setting.name in settings, setting.name


# ---------------------------------------------------------------------------------------------------------------------
# links, tree, length
# ---------------------------------------------------------------------------------------------------------------------


def links(page: Path) -> list[str]:
    """The targets that are no addresses on the web."""
    text = re.sub(r"`[^`]*`", "", prose(page))
    found = re.findall(r"\]\(([^()\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)
    return [target for target in found if not re.match(r"https?:", target)]


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings: in small letters, without punctuation, spaces as hyphens."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    assert {f"docs/{page.name}" for page in PAGES if page.parent.name == "docs"} <= set(links(README))


def test_the_tree_is_the_real_one():
    listed = subprocess.run(["git", "ls-files"], cwd=PROJECT_DIR, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        pytest.skip("downloaded without its history")
    files = listed.stdout.splitlines()
    there = {*files, *(f"{folder}/" for file in files for folder in Path(file).parents)}
    needed = {re.sub("/.*", "/", file) for file in files}
    needed |= {f"{Path(file).parent}/" for file in files if file.endswith("/__init__.py")}
    assert shown_in_the_tree() <= there
    assert needed <= shown_in_the_tree()


def shown_in_the_tree() -> set[str]:
    """The first column, names apart by one space; an indented one is in the folder above."""
    (tree,) = FENCE.findall(read(README).partition("## Where things are")[2].partition("\n## ")[0])
    shown, folder = set(), ""
    for line in tree[1].splitlines():
        names = line.strip().split("  ")[0].split()
        is_inside = line.startswith(" ")
        shown |= {f"{folder}{name}" if is_inside else name for name in names}
        folder = folder if is_inside else names[0]
    return shown


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_one_sitting(page):
    assert len(read(page).splitlines()) <= 200


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_a_page_opens_with_its_command(page):
    assert re.match(r"# .+\n\n```bash\n", read(page))
