"""What was tried and found: results.json, and the table of it in README.md.

`python -m tests.mutants.report` writes the table.
"""

import json
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.common.report import processor, update_readme, write_file

HERE = Path(__file__).parent
PATH = HERE / "results.json"


def equivalent() -> dict[tuple[str, str, str], str]:
    """Survivors that change nothing that is promised, with the reason."""
    listed = tomllib.loads((HERE / "equivalent.toml").read_text())["mutant"]
    return {(x["module"], x["was"], x["is"]): x["why"] for x in listed}


@dataclass
class Results:
    """The records of all runs: `modules` by name, each with the digest of the text it is of."""

    data: dict[str, Any]

    @classmethod
    def read(cls) -> "Results":
        """Those of results.json, or none."""
        data = json.loads(PATH.read_text()) if PATH.exists() else {"modules": {}, "kernel": []}
        return cls({"machine": processor(), **data})

    def write(self) -> None:
        """All, whole or not at all; a line for each mutant."""
        records: list[str] = []

        def short(record: dict[str, Any]) -> str:
            records.append(json.dumps(record, ensure_ascii=False))
            return f"record {len(records) - 1}"

        shown = {
            **self.data,
            "modules": {
                name: {**module, "tried": {k: short(x) for k, x in module["tried"].items()}}
                for name, module in self.data["modules"].items()
            },
        }
        text = json.dumps(shown, indent=1, ensure_ascii=False)
        text = re.sub(r'"record (\d+)"', lambda found: records[int(found[1])], text)
        write_file(PATH, text.encode() + b"\n")

    def module(self, name: str, digest: str, mutants: list[dict[str, Any]]) -> None:
        """Makes room for a module. Where its text is new, records of unchanged functions stay."""
        found = self.data["modules"].get(name, {"digest": None, "tried": {}})
        if found["digest"] != digest:
            tried = {record["fault"]: record for record in found["tried"].values()}
            kept = {
                str(rank): tried[mutant["fault"]] | mutant
                for rank, mutant in enumerate(mutants)
                if mutant["fault"] in tried
            }
            self.data["modules"][name] = {"digest": digest, "mutants": len(mutants), "tried": kept}

    def has(self, module: str, rank: int) -> bool:
        """Whether this mutant was tried."""
        return str(rank) in self.data["modules"][module]["tried"]

    def add(self, module: str, rank: int, record: dict[str, object]) -> None:
        """Keeps what became of a mutant."""
        self.data["modules"][module]["tried"][str(rank)] = record
        self.write()
        print(module, rank, "found" if record["found"] else "SURVIVED", record, flush=True)

    def kills(self, module: str) -> Counter[str]:
        """How many of a module's faults each test was the first to find."""
        tried = self.data["modules"].get(module, {"tried": {}})["tried"]
        return Counter(x["by"] for x in tried.values() if isinstance(x["by"], str))

    def survivors(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Those that no test has found yet and that are not equivalent."""
        same = equivalent()
        for module, found in self.data["modules"].items():
            for record in found["tried"].values():
                is_same = (module, record["was"], record["is"]) in same
                if not (record["found"] or record.get("found_now") or is_same):
                    yield module, record

    def now(self, record: dict[str, Any], found: dict[str, object]) -> None:
        """Keeps what the tests of today say of a survivor, or what they had no time to say."""
        if record.get("ran", 0) < record.get("of", 0):
            record |= found
        else:
            record |= {"found_now": found["found"], "by": found["by"]}
        self.write()
        print("found now" if found["found"] else "SURVIVED", record, flush=True)

    def edited(self, edit: dict[str, str]) -> dict[str, Any] | None:
        """What became of an edit of the kernel, if it was tried."""
        tried = self.data["kernel"]
        return next((x for x in tried if all(x[key] == edit[key] for key in edit)), None)

    def wants(self, edit: dict[str, str]) -> bool:
        """Whether this edit of the kernel was not tried yet, or survived and is not equivalent."""
        record = self.edited(edit)
        is_same = (edit["file"], edit["was"], edit["is"]) in equivalent()
        return record is None or not (record["found"] or record.get("found_now") or is_same)

    def add_edit(self, edit: dict[str, str], found: dict[str, object]) -> None:
        """Keeps what became of an edit of the kernel."""
        if (record := self.edited(edit)) is not None:
            self.now(record, found)
            return
        self.data["kernel"].append(edit | found)
        self.write()
        print("kernel", "found" if found["found"] else "SURVIVED", edit, found, flush=True)


def table(data: dict[str, Any]) -> str:
    """The counts of each module, and the share that is found."""
    same = equivalent()
    lines = [
        "| module | mutants | tried | equivalent | found | by tests written since | not found |",
        "|---|---|---|---|---|---|---|",
    ]
    total = [0, 0, 0, 0, 0, 0]
    for name, module in data["modules"].items():
        tried = list(module["tried"].values())
        later = sum(bool(x.get("found_now")) for x in tried)
        found = later + sum(x["found"] for x in tried)
        alike = sum(not x["found"] and (name, x["was"], x["is"]) in same for x in tried)
        row = [module["mutants"], len(tried), alike, found, later, len(tried) - alike - found]
        total = [x + y for x, y in zip(total, row, strict=True)]
        lines.append(f"| `{name}` | " + " | ".join(map(str, row)) + " |")
    lines.append("| all | " + " | ".join(map(str, total)) + " |")
    _, tried, alike, found, later, _ = total
    edits = data["kernel"]
    found_edits = sum(x["found"] for x in edits)
    later_edits = sum(bool(x.get("found_now")) for x in edits)
    alike_edits = sum((x["file"], x["was"], x["is"]) in same for x in edits)
    lines += [
        "",
        f"Of {tried - alike} that are not equivalent the tests find {found}, "
        f"{found / (tried - alike):.2%}, at least {later} of them with tests that were written for "
        f"what had survived. Of {len(edits)} edits of the kernel in C++ {alike_edits} are "
        f"equivalent; its program found {found_edits}, and tests written since find "
        f"{later_edits} more. Machine: {data['machine']}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    update_readme("results", table(Results.read().data), HERE / "README.md")
