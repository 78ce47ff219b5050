"""Compiles every program for every chip: `python -m experiments.bench.ahead`.

Each in a process of its own, which ends after `--limit-s`; results are written at once. Needs, of
jax's version, libtpu for TPUs, and jax-cuda13-plugin, jax-cuda13-pjrt and nvidia-cuda-nvcc for
GPUs. All of it takes about half an hour on two cores, nearly all of it for TPUs.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any, Literal

import tyro

from experiments.bench import publish
from experiments.bench.ahead import picture, tables
from experiments.bench.ahead.programs import LEAVES, OPTAX, compiled_for
from experiments.common import picture as pictures
from experiments.common.chips import CHIPS, ENVIRONMENT
from experiments.common.report import update_readme

Name = Literal["v5e", "v6e", "h100", "a100"]
COMMAND = "python -m experiments.bench.ahead"
RESULTS = publish.RESULTS / "ahead.json"


def figures_of(chip: str, leaves: str, name: str, limit_s: float) -> dict[str, Any]:
    """Those of a program, or why there are none."""
    command = [sys.executable, "-m", "experiments.bench.ahead.one", chip, leaves, name]
    try:
        answer = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=limit_s,
            env={**os.environ, **ENVIRONMENT},
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"not finished in {limit_s:.0f} s"}
    lines = (answer.stdout if answer.returncode == 0 else answer.stderr).splitlines() or ["?"]
    if answer.returncode != 0:
        return {"failed": lines[-1][:200]}
    found = json.loads(lines[-1])
    return {**found, "over_the_least": found["bytes"] / found["least"]}


def versions() -> dict[str, str]:
    """Of what takes part and is installed."""
    packages = {package for chip in CHIPS.values() for package in chip.packages.values()}
    names = {"jax", "optax", "flashoptim-jax", *packages}
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in sorted(names) if name in installed}


def publish_all(results: dict[str, Any]) -> None:
    """The JSON, the tables in the README, and the picture."""
    publish.write("ahead", results)
    update_readme("ahead", tables.markdown(results), publish.README)
    pictures.write(picture.draw(results), RESULTS.with_suffix(""))


def main(
    chips: tuple[Name, ...] = ("h100", "a100", "v5e", "v6e"),
    leaves: tuple[str, ...] = tuple(LEAVES),
    programs: tuple[str, ...] = (),
    limit_s: float = 240.0,
    at_once: int = 1,
) -> None:
    """Compiles every program for chips that are not there.

    Args:
        chips: which of them. What is known of the others stays.
        leaves: for which leaves, likewise.
        programs: which of those that there are for the chip and the leaves, likewise; none: all.
        limit_s: after so many seconds a process is ended.
        at_once: how many processes there are. Times of compilation are those beside each other.
    """
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known = results.get("chips", {})
    results = {"command": COMMAND, "versions": versions(), "limit_s": limit_s, "chips": known}
    for chip in chips:
        if (reason := CHIPS[chip].why_not()) is not None:
            print(f"{CHIPS[chip].name}: {reason}")
            continue
        for those in leaves:
            there = compiled_for(CHIPS[chip].platform, those)
            names = [name for name in there if name in (programs or there)]
            found = known.setdefault(CHIPS[chip].name, {}).setdefault(those, {})

            def measure(name: str, chip: str = chip, those: str = those) -> dict[str, Any]:
                return figures_of(chip, those, name, limit_s)

            with ThreadPoolExecutor(at_once) as pool:
                for name, figures in zip(names, pool.map(measure, names), strict=True):
                    found[name] = figures
                    if "compile_s" in figures and "compile_s" in found[OPTAX]:
                        ratio = figures["compile_s"] / found[OPTAX]["compile_s"]
                        figures["compile_over_optax"] = ratio
                    print(CHIPS[chip].name, those, name, figures, flush=True)
                    publish.write("ahead", results)
    publish_all(results)


if __name__ == "__main__":
    tyro.cli(main)
