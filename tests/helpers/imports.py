"""What a module imports, read from its text: also inside functions, and for type checkers alone."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path


def module_imports(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Absolute dotted names of all imports, at any depth of the file, with their line numbers.

    Args:
        package: the one that the file lies in.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def inside_functions(tree: ast.AST) -> list[str]:
    """Names that are imported when a function runs, in the order of the file; relative ones without their dots."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    names = [name for function in functions for name, _ in module_imports(function, ())]
    return list(dict.fromkeys(names))


def references(modules: Iterable[tuple[tuple[str, ...], Path]], root: str) -> dict[str, set[str]]:
    """Who imports whom among modules, given as parts below the package `root` and files."""
    files = {".".join((root, *parts)).removesuffix(".__init__"): (parts, path) for parts, path in modules}
    found = {}
    for module, (parts, path) in files.items():
        found[module] = set()
        for name, _ in module_imports(ast.parse(path.read_text(encoding="utf-8")), (root, *parts[:-1])):
            while name and name not in files:
                name = name.rpartition(".")[0]
            found[module] |= {name} - {"", module}
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Sets of modules that reach one another, each sorted (R. Tarjan 1972)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node: str) -> None:
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in graph[node]:
            if other not in order:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == order[node]:
            at = stack.index(node)
            component = stack[at:]
            del stack[at:]
            if len(component) > 1:
                found.append(sorted(component))

    for node in graph:
        if node not in order:
            visit(node)
    return found
