"""The small faults that a module can have, made by cosmic-ray."""

import ast
import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any

import cosmic_ray.plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

# An operator becomes one that takes the same operands: any test finds a TypeError.
KINDS = [
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"},
    {"Pow", "Mul", "Add"},
    {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
]
REPLACED = re.compile(r"core/Replace(?:Binary|Comparison)Operator_(\w+)_(\w+)")


def mutants(code: str) -> list[tuple[str, int, str]]:
    """All mutants of a module: an operator of cosmic-ray, where it acts, and the text."""
    found = ((*place, mutant(code, *place)) for place in places(code))
    return [(name, occurrence, text) for name, occurrence, text in found if is_python(text)]


def places(code: str) -> Iterator[tuple[str, int]]:
    """Where an operator of cosmic-ray acts, in what runs."""
    tree, lines, annotations = get_ast(code), code.splitlines(), annotated(code)
    for name in sorted(cosmic_ray.plugins.operator_names()):
        operator = cosmic_ray.plugins.get_operator(name)
        replaced = REPLACED.fullmatch(name)
        if operator.arguments() or name == "core/NoOp":
            continue
        if replaced and not any(set(replaced.groups()) <= kind for kind in KINDS):
            continue
        positions = (
            position for node in ast_nodes(tree) for position in operator().mutation_positions(node)
        )
        for occurrence, (start, _) in enumerate(positions):
            line, column = start
            is_code = not any(first <= start < last for first, last in annotations)
            # After a lone * arguments have names; nothing else may stand there.
            if is_code and not lines[line - 1].startswith("*,", column):
                yield name, occurrence


def is_python(code: str) -> bool:
    """Whether it can be read: a "not" inside of a sum, or a + in place of ** cannot."""
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def mutant(code: str, operator: str, occurrence: int) -> str:
    """The module's text with one fault."""
    return mutate_code(code, cosmic_ray.plugins.get_operator(operator)(), occurrence)


def annotated(code: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where annotations and the names of types are, which say nothing at run time."""
    tree = ast.parse(code)
    nodes: list[ast.AST] = [
        found
        for node in ast.walk(tree)
        for name in ("annotation", "returns")
        if (found := getattr(node, name, None)) is not None
    ]
    # Mask = PyTree | None
    nodes += [
        node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.BinOp)
        and isinstance(node.value.op, ast.BitOr)
    ]
    return [((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset)) for n in nodes]


def change(code: str, mutated: str) -> dict[str, Any]:
    """The lines that differ."""
    before, after = code.splitlines(), mutated.splitlines()
    first = next((i for i, (x, y) in enumerate(zip(before, after, strict=False)) if x != y), 0)
    last = -next(
        (i for i, (x, y) in enumerate(zip(before[::-1], after[::-1], strict=False)) if x != y), 0
    )
    return {
        "line": first + 1,
        "was": "\n".join(before[first : last or None]).strip(),
        "is": "\n".join(after[first : last or None]).strip(),
    }


def described(code: str, operator: str, occurrence: int, mutated: str) -> dict[str, Any]:
    """A mutant as it is recorded; `fault` is the same in any text that has the same function."""
    found = change(code, mutated)
    name, first, last = enclosing(code, found["line"])
    before, after = code.splitlines(), mutated.splitlines()
    texts = before[first:last], after[first : last + len(after) - len(before)]
    fault = digest("\0".join([name, *map("\n".join, texts)]))
    return {"operator": operator, "occurrence": occurrence, **found, "fault": fault}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def enclosing(code: str, line: int) -> tuple[str, int, int]:
    """The function, or the statement of a class or the module, that a line is in, and its lines."""
    left = [x for x in statements(code) if line <= x[2]]
    around = [x for x in left if x[1] < line]
    # A decorator that goes takes empty lines with it, which are of the next statement.
    return max(around, key=lambda x: x[1]) if around else min(left, key=lambda x: x[1])


@functools.lru_cache(32)
def statements(code: str) -> list[tuple[str, int, int]]:
    """All of them, with the names around them."""

    def within(node: ast.AST, name: str) -> Iterator[tuple[str, int, int]]:
        for child in getattr(node, "body", []):
            inner = f"{name}.{getattr(child, 'name', '')}"
            if isinstance(child, ast.ClassDef):
                yield from within(child, inner)
            decorators = [x.lineno for x in getattr(child, "decorator_list", [])]
            yield inner, min([child.lineno, *decorators]) - 1, child.end_lineno

    return list(within(ast.parse(code), ""))
