"""What is written down while a run goes on: JSON lines, and events for TensorBoard."""

import json
from pathlib import Path
from typing import Any

from experiments.common.report import write_file


class Lines:
    """A file of one JSON object a line, and the same rows in memory."""

    def __init__(self, path: Path, kept: int = 0):
        """Goes on after the first `kept` lines: those that the checkpoint knows of."""
        self.path = path
        lines = path.read_text().splitlines(keepends=True)[:kept] if kept else []
        self.rows = [json.loads(line) for line in lines]
        write_file(path, "".join(lines).encode())

    def add(self, row: dict[str, Any]) -> None:
        """Another line, in the file before this returns."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(f"{json.dumps(row)}\n")


class Metrics(Lines):
    """metrics.jsonl, and the same scalars in the folder tensorboard."""

    def __init__(self, folder: Path, kept: int = 0, step: int = 0):
        from tensorboardX import (
            SummaryWriter,
        )  # takes seconds where torch is installed, which it imports

        super().__init__(folder / "metrics.jsonl", kept)
        # TensorBoard forgets what came after the checkpoint's step.
        self.events = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def add(self, row: dict[str, Any]) -> None:
        super().add(row)
        for name, value in row.items():
            if "/" in name:
                self.events.add_scalar(name, value, row["step"])
