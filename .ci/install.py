"""Installs this project with an extra, and says what goes on: pip's hundreds of lines as a few.

python .ci/install.py EXTRA[,EXTRA]
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

LARGE = 20.0  # MB: a download that is worth a line of its own
FETCHED = re.compile(r"\s*(Downloading|Using cached) (\S+?) \(([\d.]+) (kB|MB)\)")


def main(extras: str) -> int:
    """Runs pip. Its whole output is in pip.log beside the environment's other files."""
    began, megabytes = time.monotonic(), 0.0

    def say(text: str) -> None:
        print(f"[{time.monotonic() - began:4.0f} s] {text}", flush=True)

    say(f"installing jadam[{extras}] into {sys.prefix}: asking the index what is needed")
    log = Path(sys.prefix, "pip.log")
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", "--editable", f".[{extras}]"]
    with (
        log.open("w", buffering=1) as written,
        subprocess.Popen(
            command,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as pip,
    ):
        assert pip.stdout is not None
        for line in pip.stdout:
            written.write(line)
            if found := FETCHED.match(line):
                size = float(found[3]) / (1000 if found[4] == "kB" else 1)
                megabytes += size
                if size >= LARGE:
                    name = "-".join(Path(found[2]).name.split("-")[:2])
                    say(f"{name}, {size:.0f} MB")
            elif line.strip() == "Installing build dependencies: started":
                say("fetching what the kernel is compiled with")
            elif line.strip() == "Preparing editable metadata (pyproject.toml): started":
                say("compiling the kernel, which takes some minutes")
            elif line.startswith("Installing collected packages"):
                say(f"unpacking {line.count(',') + 1} packages, {megabytes:.0f} MB of downloads")
    if pip.returncode:
        print(log.read_text()[-3000:], file=sys.stderr)
        say(f"pip failed; all it said is in {log}")
    else:
        say("installed")
    return pip.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
