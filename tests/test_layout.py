"""The layers: what a module may import, and what the package may not need."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jadam"
ORDER = [
    "jadam._types",
    "jadam._validate",
    "jadam._rounding",
    "jadam._math",
    "jadam._state",
    "jadam._storage.curve",
    "jadam._storage.floats",
    "jadam._storage.codes",
    "jadam._storage.choice",
    "jadam._storage",
    "jadam._kernels",
    "jadam._kernels.coefficients",
    "jadam._members",
    "jadam._leaf",
    "jadam._kernels.jax_internals",
    "jadam._kernels.cpu",
    "jadam._kernels.partitioning",
    "jadam._kernels.primitive",
    "jadam._kernels.choice",
    "jadam._update",
    "jadam._transform",
    "jadam._weights",
    "jadam._search",
    "jadam._diagnostics",
    "jadam.sharding._rules",
    "jadam.sharding._streamed",
    "jadam.sharding",
    "jadam.migrate._optax",
    "jadam.migrate._cast",
    "jadam.migrate._foreign",
    "jadam.migrate._torch",
    "jadam.migrate._keras",
    "jadam.migrate._safetensors",
    "jadam.migrate",
    "jadam",
]
MAY_ALSO_IMPORT = {
    "jadam._transform": {"optax"},
    "jadam._weights": {"optax"},
    "jadam.migrate._optax": {"optax"},
    "jadam.migrate._safetensors": {"safetensors"},
}


def path_of(module: str) -> Path:
    folder = PACKAGE.parent.joinpath(*module.split("."))
    return folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")


def imported(module: str) -> set[str]:
    """What a module imports: modules of jadam by their whole names, others by their first."""
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: absolute imports only"
            inside = {f"{node.module}.{alias.name}" for alias in node.names} & set(ORDER)
            found |= inside or {node.module}
    return found


def test_every_module_has_its_place_in_the_order():
    """A new module must be put somewhere, so that the next test covers it."""
    assert set(PACKAGE.rglob("*.py")) == {path_of(module) for module in ORDER}


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_above_it(module):
    """One-way imports: the leaf mathematics knows no trees, the pure pair no optax."""
    above = set(ORDER[: ORDER.index(module)])
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
