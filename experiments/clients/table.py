"""What is recorded, as the tables of the page "Programs that run with jadam"."""

import json
from typing import Any

from experiments.clients.clients import CLIENTS, RESULTS, Client
from experiments.common import report


def committed() -> dict[str, Any]:
    """The results of the last runs."""
    return json.loads(RESULTS.read_text())


def difference(result: dict[str, Any]) -> float:
    """The largest difference between losses, relative to the largest loss of the run."""
    theirs, ours = (result[library]["losses"] for library in ("optax", "jadam"))
    apart = max(abs(a - b) for a, b in zip(theirs, ours, strict=True))
    return apart / max(map(abs, theirs))


def changed(result: dict[str, Any]) -> dict[str, bool]:
    """Tests with another outcome than with optax, and whether they pass with jadam."""
    theirs, ours = (result[library]["tests"] for library in ("optax", "jadam"))
    return {name: ours.get(name) for name in theirs if ours.get(name) != theirs[name]}


def outcome(client: Client, result: dict[str, Any]) -> str:
    """How the run with jadam compares."""
    for library in ("optax", "jadam"):
        if error := result[library].get("error"):
            return f"fails with {library}: {error}"
    if client.is_tests:
        theirs, ours = (result[library]["tests"].values() for library in ("optax", "jadam"))
        passed, before = (sum(x is True for x in tests) for tests in (ours, theirs))
        return f"{passed} tests pass, {before} with optax's own"
    found, steps = difference(result), len(result["optax"]["losses"])
    same = "the same losses" if found <= client.tolerance else "OTHER LOSSES"
    return f"{same}: {steps} of them within {found:.0e} ({client.tolerance:.0e} allowed)"


def of_8_bits(result: dict[str, Any]) -> str:
    """Whether it runs with 8-bit moments."""
    if "jadam-8bit" not in result:
        return "–"
    return "fails" if "error" in result["jadam-8bit"] else "runs"


def markdown(results: dict[str, Any]) -> str:
    """A row for each client."""
    rows = []
    for client in CLIENTS:
        result = results[client.name]
        found = result["versions"]
        shown = ", ".join(f"{name} {found[name]}" for name in client.shown if name != "optax")
        rows.append(
            [
                f"[{client.title}](../../experiments/clients/programs/{client.program.name})",
                ", ".join(filter(None, (shown, f"jax {found['jax']}", f"optax {found['optax']}"))),
                outcome(client, result),
                of_8_bits(result),
                result["date"],
            ]
        )
    return report.table(["program", "versions", "with jadam's Adam", "8-bit moments", "run"], rows)


def markdown_of_tests(results: dict[str, Any]) -> str:
    """Each of optax's tests that has another outcome, with the reason."""
    rows = [
        [f"`{name}`", client.expected.get(name, "NOT EXPECTED")]
        for client in CLIENTS
        if client.is_tests
        for name in sorted(changed(results[client.name]))
    ]
    return report.table(["test", "why"], rows)
