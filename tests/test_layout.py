"""The layers: what a module may import, and what the package may not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jadam"
ORDER = [
    "_types",
    "_validate",
    "_rounding",
    "_math",
    "_codec",
    "_state",
    "_leaf",
    "_native",
    "_update",
    "_transform",
    "_weights",
    "_diagnostics",
    "sharding",
    "_walk",
    "_foreign",
    "_torch",
    "_keras",
    "_safetensors",
    "migrate",
    "__init__",
]
MAY_ALSO_IMPORT = {
    "_transform": {"optax"},
    "_weights": {"optax"},
    "_safetensors": {"safetensors"},
    "migrate": {"optax"},
}


def imported(module: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: absolute imports only"
            if node.module == "jadam":
                found |= {f"jadam.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_every_module_has_its_place_in_the_order():
    """A new module must be put somewhere, so that the next test covers it."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_above_it(module):
    """One-way imports: the leaf mathematics knows no trees, the pure pair no optax."""
    above = {f"jadam.{name}" for name in ORDER[: ORDER.index(module)]}
    names = imported(module)
    assert {name for name in names if name.startswith("jadam")} <= above
    outside = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    allowed = {"jadam", "jax", "jaxtyping", "numpy"}
    assert outside <= allowed | MAY_ALSO_IMPORT.get(module, set())


def test_importing_jadam_starts_no_backend_and_needs_no_extra():
    """`import jadam` chooses no device for the program and pulls in no experiment."""
    code = (
        "import sys, jadam, jax._src.xla_bridge as xla;"
        "assert not xla._backends, xla._backends;"
        "bad = {'flax', 'torch', 'equinox', 'experiments'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
