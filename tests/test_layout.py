"""The layers: what a module may import, and what the package may not need."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from jadam import _traced

PACKAGE = Path(__file__).parent.parent / "jadam"
ORDER = [
    "jadam._types",
    "jadam._traced",
    "jadam._validate",
    "jadam._rounding",
    "jadam._math",
    "jadam._quiet",
    "jadam._state",
    "jadam._storage.curve",
    "jadam._storage.lattice",
    "jadam._storage.floats",
    "jadam._storage.blocks",
    "jadam._storage.codes",
    "jadam._storage.choice",
    "jadam._storage",
    "jadam._masters",
    "jadam._kernels",
    "jadam._kernels.coefficients",
    "jadam._members",
    "jadam._leaf",
    "jadam._kernels.jax_internals",
    "jadam._kernels.native",
    "jadam._kernels.tiles",
    "jadam._kernels.tpu",
    "jadam._kernels.partitioning",
    "jadam._kernels.primitive",
    "jadam._kernels.rows",
    "jadam._kernels.choice",
    "jadam._update",
    "jadam._transform",
    "jadam._callers",
    "jadam._weights",
    "jadam._search",
    "jadam._moments",
    "jadam._diagnostics",
    "jadam.rows._fading",
    "jadam.rows._missed",
    "jadam.rows._touched",
    "jadam.rows._divided",
    "jadam.rows._lazy",
    "jadam.rows",
    "jadam._layers",
    "jadam.sharding._rules",
    "jadam.sharding._streamed",
    "jadam.sharding._divisible",
    "jadam.sharding._parts",
    "jadam.sharding",
    "jadam.release._scan",
    "jadam.release._program",
    "jadam.release._survey",
    "jadam.release._step",
    "jadam.release",
    "jadam.migrate._foreign",
    "jadam.migrate._optax",
    "jadam.migrate._cast",
    "jadam.migrate._torch",
    "jadam.migrate._keras",
    "jadam.migrate._safetensors",
    "jadam.migrate",
    "jadam",
]
MAY_ALSO_IMPORT = {
    "jadam._state": {"optax"},
    "jadam._transform": {"optax"},
    "jadam._weights": {"optax"},
    "jadam.release._program": {"optax"},
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


def test_what_jax_does_not_promise_is_used_in_two_rooms():
    """Who ports jadam to a new version of JAX knows where to look."""
    inner = ("jax._src", "jax.core", "jax.extend", "jax.interpreters")
    found = {module for module in ORDER if any(x.startswith(inner) for x in imported(module))}
    assert found == {"jadam._traced", "jadam._kernels.jax_internals"}


def test_a_jax_without_layouts_is_enough(monkeypatch):
    """What is asked of XLA for speed alone is left out where JAX has no words for it."""
    monkeypatch.setitem(sys.modules, "jax.experimental.layout", None)
    x = object()
    assert _traced.in_order(x) is x


def test_importing_jadam_starts_no_backend_and_needs_no_extra():
    """`import jadam` chooses no device for the program and pulls in no experiment.

    Nor does making a transformation: `jax.distributed.initialize` has to come before.
    """
    code = (
        "import sys, jadam, jax._src.xla_bridge as xla;"
        "jadam.compensated_weights(jadam.adamw(1e-3));"
        "is_there = jadam._kernels.choice.why_not() is None;"
        "jadam.adamw(1e-3, kernel='native' if is_there else 'xla');"
        "assert not xla._backends, xla._backends;"
        "bad = {'flax', 'torch', 'equinox', 'experiments'} & set(sys.modules);"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("module", [name for name in ORDER if "._" not in name], ids=str)
def test_a_public_module_shows_its_public_names_alone(module):
    """`dir` and completion are a map of what there is, and each name has a docstring."""
    shown = importlib.import_module(module)
    names = dir(shown)
    assert names == sorted(shown.__all__)
    assert all(not name.startswith("_") and getattr(shown, name).__doc__ for name in names)


EXPERIMENTS = PACKAGE.parent / "experiments"
# Where an experiment reaches inside jadam: the module that is named, and why.
INSIDE_JADAM = {
    # The dither of jadam's codes is one of the roundings that the bench of codes compares.
    "experiments/bench/codecs/blocks.py": {"jadam._rounding"},
    # How many leaves are joined in a call follows from the process's own backend.
    "experiments/bench/ahead/compiled.py": {"jadam._kernels"},
    # Which instruction sets can be forced has no public name.
    "experiments/bench/contenders.py": {"jadam._kernels"},
    # The negative control is jadam's own step with a storage of another rounding.
    "experiments/lowmem/long/nearest.py": {"jadam._leaf", "jadam._members", "jadam._storage"},
    # jadam.diagnostics returns a histogram, and its edges have no public name.
    "experiments/mnist/diagnostics.py": {"jadam._diagnostics"},
}


def names_from(path: Path) -> set[str]:
    """The dotted names that an experiment's file imports, relative ones written out.

    `from a import b` counts as a.b, and `jadam.x` in the code as an import of jadam.x.
    """
    found = set()
    folder = path.relative_to(EXPERIMENTS.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jadam":
            found.add(f"jadam.{node.attr}")
    return found


def private_module(name: str) -> str | None:
    """What is private in a name of jadam, with what is above it: jadam._a of jadam._a.b."""
    parts = name.split(".")
    private = [i for i, part in enumerate(parts) if part.startswith("_")]
    return ".".join(parts[: private[0] + 1]) if parts[0] == "jadam" and private else None


@pytest.mark.parametrize(
    "folder", sorted(path.parent.name for path in EXPERIMENTS.glob("*/__init__.py"))
)
def test_an_experiment_imports_no_other(folder):
    """What two experiments use is in experiments/common, so that each can be read by itself."""
    allowed = {folder, "common"}
    for path in (EXPERIMENTS / folder).rglob("*.py"):
        experiments = {
            name.split(".")[1] for name in names_from(path) if name.startswith("experiments.")
        }
        assert experiments <= allowed, path


def test_an_experiment_uses_the_public_names_of_jadam():
    """It is an example of how to use the package; the exceptions are listed, each with a reason."""
    found = {}
    for path in EXPERIMENTS.rglob("*.py"):
        inside = set(map(private_module, names_from(path))) - {None}
        if inside:
            found[path.relative_to(EXPERIMENTS.parent).as_posix()] = inside
    assert found == INSIDE_JADAM
