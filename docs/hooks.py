"""What the site adds to the pages: files from elsewhere in the repository, and mathematics.

Pages link to the repository's files by relative paths, so that they also work where the Markdown
is read by itself. On the site pictures are copied, and other files become links to the repository.
"""

import html
import io
import posixpath
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.mathtext import math_to_image
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = "docs/pages"
PICTURES = (".png", ".svg", ".gif")
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """Pages from elsewhere come last in the navigation."""
    for title, path in config.extra["elsewhere"].items():
        if (ROOT / path).exists():
            config.nav.append({title: _name(path)})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds those pages, and every picture of the experiments."""
    for path in config.extra["elsewhere"].values():
        if (ROOT / path).exists():
            files.append(File.generated(config, _name(path), abs_src_path=str(ROOT / path)))
    for picture in ROOT.glob("experiments/*/results/*"):
        if picture.suffix in PICTURES:
            name = picture.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Page, config: Any, files: Files) -> str:
    """Links that leave the folder of pages lead to the copies, or to the repository.

    Raises:
        FileNotFoundError: there is no such file.
    """
    elsewhere = {_name(path): path for path in config.extra["elsewhere"].values()}
    here = page.file.src_uri
    folder = posixpath.dirname(elsewhere.get(here, f"{PAGES}/{here}"))

    def target(found: re.Match[str]) -> str:
        path, anchor = posixpath.normpath(posixpath.join(folder, found[1])), found[2] or ""
        if not (ROOT / path).exists():
            raise FileNotFoundError(f"{here}: the link to {found[1]}")
        inside = path.removeprefix(f"{PAGES}/")
        name = next((name for name, there in elsewhere.items() if there == path), inside)
        if files.get_file_from_path(name):
            return f"]({posixpath.relpath(name, posixpath.dirname(here) or '.')}{anchor})"
        return f"]({config.extra['repository']}/blob/main/{path}{anchor})"

    return LINK.sub(target, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Mathematics becomes a drawing, which needs no script and no font."""

    def drawn(found: re.Match[str]) -> str:
        formula, file = html.unescape(found[1]).strip(), io.StringIO()
        with mpl.rc_context({"mathtext.fontset": "cm", "svg.fonttype": "path"}):
            math_to_image(f"${formula}$", file, dpi=72, format="svg")
        svg = file.getvalue()
        for part in (r"<metadata>.*?</metadata>", r'<g id="patch_1">.*?</g>'):  # and the ground
            svg = re.sub(part, "", svg, flags=re.DOTALL)
        svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{found[1]}"')
        # In points of a text of 10; an em is as large as the page's text.
        return re.sub(r'(width|height)="([\d.]+)pt"', _in_ems, svg, count=2)

    return re.sub(r"\\\[(.*?)\\\]", drawn, content, flags=re.DOTALL)


def _in_ems(found: re.Match[str]) -> str:
    return f'{found[1]}="{float(found[2]) / 10:.2f}em"'


def _name(path: str) -> str:
    return Path(path).name.lower()
