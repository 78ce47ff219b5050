"""Griffe's extension for the reference: every argument stands where its function stands.

In the code a hyperparameter is described once, in `adam` or `update`, and other entries say "as in
`adam`". A reader of one entry wants them all, so here each entry gets the descriptions that it
leaves out or refers to, in the order of its signature. An argument that is described nowhere is an
error.
"""

import re
from pathlib import Path
from typing import Any

import griffe

REFERENCE_PAGES = Path(__file__).parent / "pages" / "reference"
OPTIONS = {"warnings": False, "returns_multiple_items": False, "returns_named_value": False}
Kind = griffe.DocstringSectionKind
ELSEWHERE = ("adam", "adamw", "nadam", "amsgrad", "update", "state_shardings")
"""Whom a description is taken from after those that an entry refers to, in this order."""
SENTENCE = re.compile(r"\s*(?:Other\s+arguments|Arguments)\s+as\s+in\s+`\w+`\.")
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)
EQUATIONS = re.compile(r"^\S+(?: = |: {2,}).*(?:\n(?!with ).*=.*)*\n?", re.MULTILINE)
REFERENCE = re.compile(r"\bas\s+in\s+`(\w+)`")

Texts = dict[str, dict[Kind, dict[str, str]]]


class Arguments(griffe.Extension):
    """Completes the entries of everything public in the package."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """After the package was read."""
        public = dict(_public(pkg))
        texts: Texts = {name: _texts(entry) for name, entry in public.items()}
        for page in REFERENCE_PAGES.glob("*.md"):
            for name in re.findall(r"^::: jadam\.(?:\w+\.)?(\w+)$", page.read_text(), re.M):
                if name in public:
                    _complete(name, public[name], texts)


def _public(module: griffe.Module) -> list[tuple[str, griffe.Function | griffe.Class]]:
    found = []
    for name, member in module.members.items():
        is_foreign = member.is_alias and not member.target_path.startswith("jadam")
        if name.startswith("_") or is_foreign:
            continue
        target = member.final_target if member.is_alias else member
        if target.is_module:
            found += _public(target)
        elif (target.is_function or target.is_class) and target.docstring:
            found.append((name, target))
    return found


def _name(item: Any) -> str:
    """Of an argument or an attribute; of an error its type."""
    return getattr(item, "name", None) or str(item.annotation)


def _texts(entry: griffe.Function | griffe.Class) -> dict[Kind, dict[str, str]]:
    sections = entry.docstring.parse("google", **OPTIONS)
    kinds = (Kind.parameters, Kind.attributes, Kind.raises)
    return {s.kind: {_name(x): x.description for x in s.value} for s in sections if s.kind in kinds}


def _resolved(kind: Kind, item: str, text: str, texts: Texts) -> str:
    """A description, or the one that it refers to in its first sentence, and what it adds."""
    first, dot, rest = text.partition(". ")
    found = REFERENCE.match(first) or re.search(REFERENCE.pattern + r"\.?$", first)
    there = texts.get(found[1], {}).get(kind, {}).get(item) if found else None
    return text if there is None else f"{there} {rest}" if dot else there


def _complete(name: str, entry: griffe.Function | griffe.Class, texts: Texts) -> None:
    docstring = entry.docstring
    references = REFERENCE.findall(docstring.value)
    docstring.value = SENTENCE.sub("", docstring.value)
    examples = DOCTEST.findall(docstring.value)
    docstring.value = DOCTEST.sub("", docstring.value)
    sections = docstring.parse("google", **OPTIONS)
    for section in sections:
        if section.kind is Kind.attributes:
            for item in section.value:
                item.description = _resolved(section.kind, item.name, item.description, texts)
        elif section.kind is Kind.raises and (found := REFERENCE.search(str(section.value[0]))):
            theirs = texts[found[1]][Kind.raises]
            section.value = [
                griffe.DocstringRaise(annotation=a, description=d) for a, d in theirs.items()
            ]
    if entry.is_function and (items := _arguments(name, entry, references, texts)):
        sections = [s for s in sections if s.kind is not Kind.parameters]
        place = next((i for i, s in enumerate(sections) if s.kind is not Kind.text), len(sections))
        sections.insert(place, griffe.DocstringSectionParameters(items))
    for section in sections:
        if section.kind is Kind.text:  # equations keep their lines
            section.value = EQUATIONS.sub(r"```text\n\g<0>\n```\n", section.value)
    if examples:
        fenced = "\n\n".join(f"```pycon\n{example}\n```" for example in examples)
        sections.append(griffe.DocstringSectionText(fenced))
    docstring.__dict__["parsed"] = sections


def _arguments(
    name: str, function: griffe.Function, references: list[str], texts: Texts
) -> list[griffe.DocstringParameter]:
    items = []
    for parameter in function.parameters:
        if parameter.kind is griffe.ParameterKind.var_keyword:
            continue
        order = (name, *references, *ELSEWHERE)
        sources = (texts.get(n, {}).get(Kind.parameters, {}) for n in order)
        text = next((s[parameter.name] for s in sources if parameter.name in s), None)
        if text is None:
            raise ValueError(f"jadam.{name}: the argument {parameter.name} is described nowhere")
        items.append(
            griffe.DocstringParameter(
                parameter.name,
                annotation=parameter.annotation,
                description=_resolved(Kind.parameters, parameter.name, text, texts),
                value=parameter.default,
            )
        )
    return items
