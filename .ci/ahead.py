"""Installs what compiles for TPUs and for NVIDIA's GPUs into a folder, of JAX's version here.

python .ci/ahead.py FOLDER

They lie outside of the environment, where JAX would look for their devices in every program. Where
they cannot be had, nothing is installed, and the tests that need them are skipped.
"""

import subprocess
import sys
from importlib import metadata
from pathlib import Path


def packages() -> list[str]:
    """What to install, without what they need themselves: a compiler alone needs no device."""
    jax = metadata.version("jax")
    libtpu = next(x for x in metadata.requires("jax") or () if x.startswith("libtpu"))
    plugins = [f"jax-cuda13-plugin=={jax}", f"jax-cuda13-pjrt=={jax}"]
    return [libtpu.partition(";")[0].strip(), *plugins, "nvidia-cuda-nvcc>=13,<14"]


def main(folder: Path) -> None:
    """Runs pip, unless the folder has them."""
    wanted, stamp = packages(), folder / "installed"
    if stamp.exists() and stamp.read_text().split() == wanted:
        return
    print(f"installing {', '.join(wanted)} into {folder}", flush=True)
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--upgrade"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *wanted]
    if subprocess.run(command, check=False).returncode:
        print("they cannot be had: what is compiled ahead of time is not tested", file=sys.stderr)
    else:
        stamp.write_text("\n".join(wanted))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
