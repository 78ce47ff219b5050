"""Small faults, one at a time: do the tests find them?

`python -m tests.mutants --sample 10` makes ten mutants of each module in tests.toml, drawn by
a seed, and runs the module's tests on each; `--kernel` makes those of the C++ in kernel.toml.
Results go into results.json as they come, and a run goes on where the one before was stopped.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib.util
import os
import random
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.testing import run_tests
from cosmic_ray.work_item import TestOutcome

from tests.mutants import report

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
SEED = 18
TIMEOUT = 1800  # seconds, for what never ends

# An operator becomes one that takes the same operands: any test finds a TypeError.
KINDS = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"},
    {"Pow", "Mul", "Add"},
    {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
]
REPLACED = re.compile(r"core/Replace(?:Binary|Comparison)Operator_(\w+)_(\w+)")

# Run by Python at its start, in the tests and in what they start: an editable installation would
# give jadam from the repository and not from the copy.
SITE = """
import sys
sys.meta_path[:] = [x for x in sys.meta_path if type(x).__module__ != "_editable_skbc_jadam"]
sys.path[:] = [x for x in sys.path if x != {root!r}]
"""


def copy_tree() -> None:
    """A copy of the repository in build/mutants/tree, from which Python there imports jadam."""
    shutil.rmtree(TREE, ignore_errors=True)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (TREE / name).parent.mkdir(parents=True, exist_ok=True)
            # With the time of now: what was built of the copy before may have a fault in it.
            shutil.copy(ROOT / name, TREE / name)
    library = importlib.util.find_spec("jadam._kernel")
    if library is None or library.origin is None:
        raise SystemExit("the kernel is not built: its tests would find nothing")
    shutil.copy2(library.origin, TREE / "jadam")
    site = BUILD / "site"
    site.mkdir(exist_ok=True)
    (site / "sitecustomize.py").write_text(SITE.format(root=str(ROOT)))
    os.environ["PYTHONPATH"] = f"{TREE}{os.pathsep}{site}"
    compiled = BUILD / "jax"
    if not compiled.exists() and (ROOT / ".pytest_cache/jax").exists():
        shutil.copytree(ROOT / ".pytest_cache/jax", compiled)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
    found = subprocess.run(
        [sys.executable, "-c", "import jadam; print(jadam.__file__, jadam.kernels()['cpu'])"],
        cwd=TREE, capture_output=True, text=True, check=True,
    )  # fmt: skip
    path, kernel = found.stdout.strip().split(" ", 1)
    if path != str(TREE / "jadam" / "__init__.py") or "native" not in kernel:
        raise SystemExit(f"the copy is not what is imported: {path}, {kernel}")


def mutants(code: str) -> Iterator[tuple[str, int]]:
    """All mutants of a module: an operator of cosmic-ray, and where it acts."""
    tree, lines, annotations = get_ast(code), code.splitlines(), annotated(code)
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)
        replaced = REPLACED.fullmatch(name)
        if operator.arguments() or name == "core/NoOp":
            continue
        if replaced and not any(set(replaced.groups()) <= kind for kind in KINDS):
            continue
        places = (
            place for node in ast_nodes(tree) for place in operator().mutation_positions(node)
        )
        for occurrence, (start, _) in enumerate(places):
            line, column = start
            is_code = not any(first <= start < last for first, last in annotations)
            # After a lone * arguments have names; nothing else may stand there.
            if is_code and not lines[line - 1].startswith("*,", column):
                yield name, occurrence


def mutant(code: str, operator: str, occurrence: int) -> str:
    """The module's text with one fault."""
    return mutate_code(code, cosmic_ray.plugins.get_operator(operator)(), occurrence)


def annotated(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where the annotations are, which say nothing at run time."""
    nodes = [
        found
        for node in ast.walk(ast.parse(code))
        for name in ("annotation", "returns")
        if (found := getattr(node, name, None)) is not None
    ]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def change(code: str, mutated: str) -> dict[str, object]:
    """The lines that differ."""
    before, after = code.splitlines(), mutated.splitlines()
    first = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), 0)
    last = -next(
        (i for i, (x, y) in enumerate(zip(before[::-1], after[::-1], strict=False)) if x != y), 0
    )
    return {
        "line": first + 1,
        "was": "\n".join(before[first : last or None]).strip(),
        "is": "\n".join(after[first : last or None]).strip(),
    }


def tested(module: str, mutated: str, tests: list[str]) -> dict[str, object]:
    """What the tests say of a module in the copy with another text."""
    path, began = TREE / module, time.monotonic()
    right = path.read_text()
    path.write_text(mutated)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"]
    try:
        with contextlib.chdir(TREE):
            outcome, output = run_tests(" ".join([*command, *tests]), TIMEOUT)
    finally:
        path.write_text(right)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    by = failed[1] if failed else output.strip().splitlines()[-1:]
    return {
        "found": outcome is not TestOutcome.SURVIVED,
        "by": None if outcome is TestOutcome.SURVIVED else by,
        "seconds": round(time.monotonic() - began),
    }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def sample(modules: dict[str, list[str]], size: int, results: report.Results) -> None:
    """The first `size` mutants of each module in an order drawn by the seed, in turns."""
    drawn = {}
    for module in modules:
        code = (ROOT / module).read_text()
        drawn[module] = list(mutants(code))
        random.Random(f"{SEED} {module}").shuffle(drawn[module])
        results.module(module, digest(code), len(drawn[module]))
    for rank in range(size):
        for module, tests in modules.items():
            if rank >= len(drawn[module]) or results.has(module, rank):
                continue
            code = (TREE / module).read_text()
            operator, occurrence = drawn[module][rank]
            mutated = mutant(code, operator, occurrence)
            what = {"operator": operator, "occurrence": occurrence, **change(code, mutated)}
            results.add(module, rank, what | tested(module, mutated, tests))


def again(modules: dict[str, list[str]], results: report.Results) -> None:
    """Survivors that are not equivalent, with the tests as they are now."""
    for module, record in results.survivors():
        if module in modules:
            mutated = mutant((TREE / module).read_text(), record["operator"], record["occurrence"])
            results.now(record, tested(module, mutated, modules[module]))


def baseline(modules: dict[str, list[str]]) -> None:
    """Without a fault all tests pass; what they compile stays for the mutants."""
    tests = dict.fromkeys(test for listed in modules.values() for test in listed)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    if subprocess.run(command, cwd=TREE).returncode:
        raise SystemExit("the tests fail without any fault")


def kernel(results: report.Results) -> None:
    """Edits of the C++, for the program that checks it by itself; survivors are tried again."""
    for edit in tomllib.loads((HERE / "kernel.toml").read_text())["edit"]:
        path, began = TREE / "jadam/_kernels/native" / edit["file"], time.monotonic()
        right = path.read_text()
        if right.count(edit["was"]) != 1:
            raise SystemExit(f"{edit['file']}: expected {edit['was']!r} once")
        if not results.wants(edit):
            continue
        path.write_text(right.replace(edit["was"], edit["is"]))
        try:
            done = checked()
        finally:
            path.write_text(right)
        lines = (done.stdout + done.stderr).strip().splitlines()
        results.add_edit(
            edit,
            {
                "found": done.returncode != 0,
                "by": (lines or [f"exit code {done.returncode}"])[-1] if done.returncode else None,
                "seconds": round(time.monotonic() - began),
            },
        )


def checked() -> subprocess.CompletedProcess[str]:
    """The program of tests/native, built of the copy and run in its short form."""
    folder = BUILD / "native"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    steps = [
        ["-S", TREE / "tests/native", "-B", folder, f"-DPython3_EXECUTABLE={sys.executable}"],
        ["--build", folder, "--target", "check"],
    ]
    for step in steps:
        subprocess.run(
            ["cmake", *step], check=True, env=environment, capture_output=True, text=True
        )
    return subprocess.run([folder / "check", "--short"], capture_output=True, text=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--sample", type=int, default=sys.maxsize, help="mutants of each module")
    parser.add_argument("--only", action="append", help="a module, instead of all")
    parser.add_argument("--kernel", action="store_true", help="the C++ alone")
    parser.add_argument("--again", action="store_true", help="the survivors alone")
    parser.add_argument("--skip-baseline", action="store_true", help="the tests are known to pass")
    options = parser.parse_args()
    modules = tomllib.loads((HERE / "tests.toml").read_text())["modules"]
    modules = {k: v for k, v in modules.items() if not options.only or k in options.only}
    copy_tree()
    results = report.Results.read()
    if options.kernel:
        if checked().returncode:
            raise SystemExit("the program fails without any fault")
        kernel(results)
        return
    if not options.skip_baseline:
        baseline(modules)
    if options.again:
        again(modules, results)
    else:
        sample(modules, options.sample, results)


if __name__ == "__main__":
    main()
