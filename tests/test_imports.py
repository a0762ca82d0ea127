import ast
import subprocess
import sys
from pathlib import Path

import pytest

import imports


def test_every_name_resolves():
    for name in imports.__all__:
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
    assert names == set(imports.__all__) == set(imports._SOURCES)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no_such_name"):
        imports.__getattr__("no_such_name")


@pytest.mark.parametrize("module", ["imports", "main", "training.config", "model_strategy", "lr_schedulers"])
def test_importing_costs_no_torch(module):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=Path(imports.__file__).parent, check=True)
