"""Small faults, one at a time: do the tests find them?

`python -m tests.mutants --sample 10` makes ten mutants of each module in tests.toml, drawn by
a seed, and runs the module's tests on each; `--kernel` makes those of the C++ in kernel.toml.
Results go into results.json as they come, and a run goes on where the one before was stopped.
"""

import argparse
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.mutants import forks, report
from tests.mutants.faults import described, digest, mutant, mutants
from tests.mutants.lines import Lines

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "mutants"
TREE = BUILD / "tree"
SEED = 18

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


Fault = tuple[str, str, str, dict[str, Any]]  # module, its text, its text with the fault, record


def drawn(modules: Iterable[str], size: int, results: report.Results) -> Iterator[Fault]:
    """The first `size` mutants of each in an order drawn by the seed, but for those tried."""
    codes = {module: (TREE / module).read_text() for module in modules}
    with ProcessPoolExecutor() as pool:
        for (module, code), found in zip(
            codes.items(), pool.map(mutants, codes.values()), strict=True
        ):
            random.Random(f"{SEED} {module}").shuffle(found)
            records = [described(code, *mutant) for mutant in found]
            results.module(module, digest(code), records)
            for rank, (record, (*_, mutated)) in enumerate(
                zip(records[:size], found[:size], strict=True)
            ):
                if not results.has(module, rank):
                    yield module, code, mutated, {"rank": rank} | record


def survived(modules: Iterable[str], results: report.Results) -> Iterator[Fault]:
    """The survivors that are not equivalent."""
    for module, record in results.survivors():
        if module in modules:
            code = (TREE / module).read_text()
            yield module, code, mutant(code, record["operator"], record["occurrence"]), record


def record_lines(files: list[str], late: set[str]) -> Lines:
    """Runs the tests without a fault, where they or the package changed: which lines each runs."""
    folder = BUILD / "lines"
    folder.mkdir(exist_ok=True)
    package = "".join(x.read_text() for x in sorted(TREE.glob("jadam/**/*.py")))

    def recorded(name: str) -> Path:
        path = folder / f"{digest(package + name + (TREE / name).read_text())}.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        command += ["-p", "tests.mutants.lines", name]
        environment = {**os.environ, "MUTANTS_LINES": str(path)}
        if not path.exists() and subprocess.run(command, cwd=TREE, env=environment).returncode:
            raise SystemExit(f"{name} fails without any fault")
        return path

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return Lines.read(dict(zip(files, pool.map(recorded, files), strict=True)), late)


def tested(
    faults: list[Fault],
    lines: Lines,
    modules: dict[str, list[str]],
    results: report.Results,
    setup: dict[str, Any],
) -> Iterator[tuple[Fault, dict[str, Any]]]:
    """What the tests say of each fault: first of those in what runs at import."""
    jobs: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for key, (module, was, now, record) in enumerate(faults):
        tests, at_import = lines.covering(module, was, record["line"])
        at_import = at_import or forks.is_at_import(was, now)
        if at_import:
            tests = tests or {x for x in lines.seconds if x.startswith(tuple(modules[module]))}
            # pytest reads a file that it is given by itself, and knows of no fault in it.
            tests = {x for x in tests if not x.startswith("jadam/")}
        job = {"key": key, "module": module, "was": was, "now": now}
        if tests:
            jobs[not at_import].append(
                job | {"tests": {x: lines.seconds[x] for x in sorted(tests)}}
            )
        else:
            yield faults[key], {"found": False, "by": None, "ran": 0, "of": 0}
    for warm, some in jobs.items():
        command = [sys.executable, "-m", "tests.mutants.forks"]
        kills = {module: results.kills(module) for module in modules}
        with subprocess.Popen(
            command, cwd=TREE, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin
            assert process.stdout
            with process.stdin:
                process.stdin.writelines(
                    json.dumps(x) + "\n" for x in ({**setup, "warm": warm, "kills": kills}, *some)
                )
            for outcome in map(json.loads, process.stdout):
                yield faults[outcome.pop("key")], outcome


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
    parser.add_argument("--budget", type=float, default=30, help="CPU seconds for a mutant")
    options = parser.parse_args()
    listed = tomllib.loads((HERE / "tests.toml").read_text())
    modules = {k: v for k, v in listed["modules"].items() if not options.only or k in options.only}
    copy_tree()
    results = report.Results.read()
    if options.kernel:
        if checked().returncode:
            raise SystemExit("the program fails without any fault")
        kernel(results)
        return
    late = set(listed["late"])
    lines = record_lines(sorted({x.split("::")[0] for v in modules.values() for x in v}), late)
    chosen = (
        survived(modules, results) if options.again else drawn(modules, options.sample, results)
    )
    # In turns, so that a run that is stopped has tried some of each.
    faults = sorted(chosen, key=lambda fault: fault[3].get("rank", 0))
    setup = {"budget": options.budget, "processes": os.cpu_count()}
    # pytest would import a module for its examples in a way of its own.
    files = {x.split("::")[0] for x in lines.seconds} - late
    setup["files"] = sorted(x for x in files if not x.startswith("jadam/"))
    for fault, outcome in tested(faults, lines, modules, results, setup):
        if "error" in outcome:
            print(*fault[0::3], outcome, flush=True)
        elif options.again:
            results.now(fault[3], outcome)
        else:
            results.add(fault[0], fault[3].pop("rank"), fault[3] | outcome)


if __name__ == "__main__":
    main()
