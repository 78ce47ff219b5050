"""Runs each client with optax's Adam and with jadam's, and writes what came: `make clients`.

What is recorded for the same pins and the same jadam is not run again. Environments lie in
build/clients; uv shares what they have in common.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import tyro
from uv import find_uv_bin

from experiments.clients.clients import CLIENTS, HERE, RESULTS, Client, key, versions
from experiments.common.report import write_file

ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "clients"
LIBRARIES = ("optax", "jadam", "jadam-8bit")
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    "HOME": str(Path.home()),
    "PATH": "/usr/bin:/bin",
}
MAKES_PINS = ("jax>=0.10", "optax>=0.2.8", "jaxtyping>=0.3")  # as pyproject.toml has them


@dataclass(frozen=True)
class Args:
    """What to run.

    Attributes:
        names: clients. Default: all.
        again: also what is recorded.
        pin: write the pins anew, of the newest versions, and run nothing.
    """

    names: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    again: bool = False
    pin: bool = False


def uv(*args: Any) -> None:
    """A command of uv, whose output is shown where it fails."""
    command = [find_uv_bin(), "--quiet", *map(str, args)]
    subprocess.run(command, check=True, cwd=ROOT)


def pin(client: Client) -> None:
    """Resolves the versions of everything that a client needs."""
    asked = BUILD / f"{client.name}.in"
    asked.parent.mkdir(parents=True, exist_ok=True)
    asked.write_text("\n".join((*MAKES_PINS, *client.requirements)))
    options = ("--no-header", "--no-annotate", "--python-version", client.python)
    uv("pip", "compile", asked, "--output-file", client.pins, "--upgrade", *options)


def environment(client: Client, wheel: Path) -> Path:
    """The Python of an environment that holds the pins and jadam, and nothing else."""
    folder = BUILD / client.name
    python = folder / "bin" / "python"
    if not python.exists():
        uv("venv", folder, "--python", client.python)
    uv("pip", "sync", client.pins, "--python", python)
    uv("pip", "install", wheel, "--no-deps", "--python", python)
    return python


def ran(client: Client, python: Path, library: str) -> dict[str, Any]:
    """What the program printed last, as JSON."""
    done = subprocess.run(
        [python, HERE / "swap.py", library, client.program],
        # Float64 parameters are never coded.
        env=ENVIRONMENT | {"JAX_ENABLE_X64": str(int(client.x64 and library in LIBRARIES[:2]))},
        cwd=BUILD,
        capture_output=True,
        text=True,
        check=False,
    )
    (BUILD / f"{client.name}-{library}.log").write_text(done.stdout + done.stderr)
    if done.returncode:
        return {"error": (done.stderr.strip() or "nothing was printed").splitlines()[-1]}
    return json.loads(done.stdout.splitlines()[-1])


def main(args: Args) -> None:
    """Goes through the clients; each is written as soon as it is done."""
    if unknown := set(args.names) - {client.name for client in CLIENTS}:
        sys.exit(f"expected clients among {[c.name for c in CLIENTS]}, got {sorted(unknown)}")
    chosen = [client for client in CLIENTS if not args.names or client.name in args.names]
    if args.pin:
        for client in chosen:
            pin(client)
        return
    recorded = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wheel = None
    for place, client in enumerate(chosen, start=1):
        began, where = time.monotonic(), f"{place}/{len(chosen)} {client.name}"
        if recorded.get(client.name, {}).get("key") == key(client) and not args.again:
            print(f"{where}: recorded on {recorded[client.name]['date']}", flush=True)
            continue
        if wheel is None:
            print("building jadam's wheel", flush=True)
            uv("build", "--wheel", "--out-dir", BUILD / "wheel", "--clear")
            (wheel,) = (BUILD / "wheel").glob("*.whl")
        python = environment(client, wheel)
        libraries = LIBRARIES[:2] if client.is_tests else LIBRARIES
        results = {library: ran(client, python, library) for library in libraries}
        recorded[client.name] = {
            "key": key(client),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": versions(client),
            **results,
        }
        text = json.dumps(recorded, indent=1, sort_keys=True) + "\n"
        write_file(RESULTS, text.encode())
        print(f"{where}: {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
