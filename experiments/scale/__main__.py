"""The tables of README.md: `python -m experiments.scale`."""

from pathlib import Path
from typing import Any

from experiments.common.report import table, update_readme, write_json

from .memory import SETTINGS, row
from .models import MODELS

RESULTS = Path(__file__).parent / "results" / "scale.json"
README = Path(__file__).parent / "README.md"
DEVICES = (8, 64, 512, 4096, 16384)


def rows(models: tuple[str, ...] = tuple(MODELS)) -> list[dict[str, Any]]:
    """Every model on every number of devices, whole and sharded parameters, all settings."""
    return [
        row(model, devices, setting, sharded=sharded)
        for sharded in (False, True)
        for model in models
        for devices in DEVICES
        for setting in SETTINGS
    ]


def gigabytes(*sizes: int) -> str:
    """Three digits, or all before the point."""
    return " / ".join(
        f"{size / 1e9:,.0f}" if size >= 1e11 else f"{size / 1e9:.3g}" for size in sizes
    )


def markdown(measured: list[dict[str, Any]], *, sharded: bool) -> str:
    """A line for each model and number of devices; float32 / bf16 / 8-bit in each cell."""
    columns = ["model", "devices"]
    columns += ["data x fsdp x model"] if sharded else []
    columns += ["parameters", "state", "state, ZeRO-1", "sent for gradients and ZeRO-1"]
    columns += ["sent for FSDP"] if sharded else []
    lines = []
    for model in MODELS:
        for devices in DEVICES:
            three = [
                r
                for r in measured
                if (r["model"], r["devices"], r["sharded"]) == (model, devices, sharded)
            ]
            cells = [model, f"{devices:,}"]
            cells += ["x".join(map(str, three[0]["mesh"].values()))] if sharded else []
            names = ["weights", "state", "state_zero_1", "sent_for_zero_1"]
            names += ["sent_for_fsdp"] if sharded else []
            cells += [gigabytes(*(r[name] for r in three)) for name in names]
            lines.append(cells)
    return table(columns, lines)


def main() -> None:
    measured = rows()
    write_json(RESULTS, {"rows": measured})
    for name, sharded in (("whole", False), ("sharded", True)):
        update_readme(name, markdown(measured, sharded=sharded), README)


if __name__ == "__main__":
    main()
