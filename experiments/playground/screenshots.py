"""`python -m experiments.playground.screenshots`: pictures of the page, and how fast it answers."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from playwright.sync_api import Page

from experiments.common.report import (
    provenance,
    quartiles,
    table,
    update_readme,
    write_file,
    write_json,
)

from .browser import chromium, opened, serving
from .compute import MAX_STEPS, OPTIMIZERS

COMMAND = "python -m experiments.playground.screenshots"
README = Path(__file__).parent / "README.md"
SIZES = {1280: 1000, 400: 860}
SLIDERS = ("learning_rate", "b1", "b2", "eps", "x", "y", "steps", "noise", "seed")
MOVES = 10
HEIGHT = "document.documentElement.scrollHeight"

# From a key to the next frame after Adam's inner values, the last data, are there.
WATCH = """() => {
  const inner = Bokeh.documents[0].get_model_by_name("inner values")
  window.seen = []
  let began = 0
  document.addEventListener("keydown", () => { began = performance.now() }, true)
  inner.properties.data.change.connect(() =>
    requestAnimationFrame(() => window.seen.push(performance.now() - began)))
}"""


@dataclass(frozen=True)
class Screenshots:
    """Screenshots of the playground at two widths, and its response to its sliders."""

    out: Path = Path("runs/playground")
    """Where page-1280.png, page-400.png and response.json go."""
    readme: Path = README
    """Where the response is written, too."""


def response(page: Page) -> dict[str, object]:
    """Every slider moved with every optimizer and all steps, in milliseconds."""
    for name in OPTIMIZERS:
        page.get_by_label(name, exact=True).check()
    handles = dict(zip(SLIDERS, page.locator(".noUi-handle").all(), strict=True))
    handles.pop("steps").press("End")
    page.wait_for_function(
        "steps => Bokeh.documents[0].get_model_by_name('inner values').data.step.length === steps",
        arg=MAX_STEPS,
    )
    page.evaluate(WATCH)
    computed = []
    for handle in handles.values():
        for _ in range(MOVES):
            before = page.evaluate("seen.length")
            handle.press("ArrowRight")
            page.wait_for_function("before => seen.length > before", arg=before)
            status = page.get_by_text("Computed in").inner_text()
            computed.append(int(re.search(r"(\d+) ms", status)[1]))
    seen = page.evaluate("seen")
    return {
        "optimizers": len(OPTIMIZERS),
        "steps": MAX_STEPS,
        "moves": len(seen),
        "computed": {**quartiles(computed), "largest": max(computed)},
        "seen": {**quartiles(seen), "largest": max(seen)},
    }


def main(config: Screenshots) -> None:
    with serving() as url, chromium() as browser:
        for width, height in SIZES.items():
            page, complaints = opened(browser, url, width, height)
            # In a window as high as the page: what sticks to its top would else be torn.
            page.set_viewport_size({"width": width, "height": page.evaluate(HEIGHT)})
            page.wait_for_timeout(1000)
            write_file(config.out / f"page-{width}.png", page.screenshot())
            if complaints:
                sys.exit(f"error: the page complains: {complaints}")
            page.close()
        measured = response(opened(browser, url, 1280, 1000)[0])
    write_json(config.out / "response.json", {**provenance(COMMAND), **measured})
    rows = [
        [label, *(f"{measured[key][value]:.0f}" for value in ("median", "high", "largest"))]
        for key, label in (
            ("computed", "the page's own line: computed and handed over"),
            ("seen", "from the key to the next frame with the new data"),
        )
    ]
    columns = ["milliseconds", "median", "upper quartile", "largest"]
    update_readme("response", table(columns, rows), config.readme)


if __name__ == "__main__":
    main(tyro.cli(Screenshots, prog=COMMAND))
