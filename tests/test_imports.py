import ast
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import imports
from common.files import PROJECT_DIR


def test_every_name_resolves():
    for name in imports._SOURCES:
        assert getattr(imports, name) is not None


def test_the_type_checker_sees_the_same_names():
    tree = ast.parse(Path(imports.__file__).read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    names = {
        alias.asname or alias.name
        for node in guarded.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert names == set(imports._SOURCES)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        imports.__getattr__("no_such_name")


@pytest.mark.parametrize(
    ("package", "module"),
    [
        *(("torch", name) for name in ("imports", "main", "training.config", "model_strategy", "lr_schedulers")),
        *(("torchvision", name) for name in ("data_utils", "tools.networks", "tools.web.app", "hubconf")),  # 160 MiB
    ],
)
def test_importing_loads_no(package, module):
    script = f"import sys, {module}; sys.exit({package!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=PROJECT_DIR, check=True)


# Who may import whom. What stands in no line of its own, as a script of one's own, may import anything.

ROOT = {"data_utils", "imports", "lr_schedulers", "model_strategy", "visualization"}  # and main, which nobody imports
ANYBODY_MAY = {"imports", "common"}
MAY_IMPORT = {
    "imports": set(),
    "common": set(),
    "models": set(),
    "image_data": set(),
    "lr_schedulers": set(),
    "model_strategy": {"models"},
    "data_utils": {"image_data"},
    "visualization": {"model_strategy"},
    "training": ROOT | {"models", "image_data"},
    "tools": ROOT | {"models", "image_data", "training"},
    "main": ROOT | {"models", "image_data", "training"},
    "hubconf": ROOT | {"image_data"},
}
# What has an import in a string, so that nothing of it is loaded before it is asked for.
BY_STRING = {"imports"}


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything outside the tests."""
    files = [*PROJECT_DIR.glob("*.py"), *(path for name in MAY_IMPORT for path in (PROJECT_DIR / name).rglob("*.py"))]
    return {".".join(path.relative_to(PROJECT_DIR).with_suffix("").parts): path for path in files}


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[tuple[str, bool]]:
    """The modules of ours that a file imports, at its top or in a function, and whether only for a type checker."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guards = (node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    guarded = {inner for guard in guards for part in guard.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports by a relative path"
            found = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for module in known & {*found, *(f"{package}.__init__" for package in found)} - {name}:
            yield module, node in guarded


@pytest.fixture(scope="module")
def graph() -> dict[str, dict[str, bool]]:
    """Module -> what it imports -> whether only for a type checker."""
    found = modules()
    edges = {}
    for name, path in found.items():
        edges[name] = {}
        for module, guarded in imports_of(name, path, set(found)):
            edges[name][module] = edges[name].get(module, True) and guarded
    assert len(edges) > 50
    return edges


def package(module: str) -> str:
    return module.partition(".")[0]


def test_everyone_imports_what_they_may(graph):
    assert {package(module) for module in graph} <= MAY_IMPORT.keys()
    wrong = [
        f"{module} imports {other}"
        for module, others in graph.items()
        for other in others
        if package(other) not in {package(module), *ANYBODY_MAY, *MAY_IMPORT[package(module)]}
    ]
    assert wrong == []


@pytest.mark.parametrize("of", ["modules", "packages"])
def test_there_is_no_circle(graph, of):
    edges: dict[str, set[str]] = {}
    for module, others in graph.items():
        for other in (other for other, guarded in others.items() if not guarded):
            pair = (module, other) if of == "modules" else (package(module), package(other))
            edges.setdefault(pair[0], set()).update({pair[1]} - {pair[0]})
    while edges:  # those that import nothing that is left go, until there are none, or circles alone
        leaves = set(itertools.chain(*edges.values())) - edges.keys() | {name for name in edges if not edges[name]}
        assert leaves, f"a circle among {sorted(edges)}"
        edges = {name: others - leaves for name, others in edges.items() if name not in leaves}


def test_no_import_is_hidden_in_a_string():
    for name, path in modules().items():
        text = path.read_text(encoding="utf-8")
        assert name in BY_STRING or not any(word in text for word in ("import_module(", "__import__(")), name
