"""The direction of imports: a layer imports from its own and lower layers only, and there are no cycles.

Imports inside functions and under ``TYPE_CHECKING`` count too.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import primeflow_perturbench.configs

PACKAGE = "primeflow_perturbench"
SOURCE = Path(__file__).parents[1] / PACKAGE
CONFIGS = Path(primeflow_perturbench.configs.__file__).parent
EMBEDDED = f"{PACKAGE}.perturbench.embedded"

# From top to bottom. A module belongs to the longest name that fits: `sampling.predict` lies above `sampling`.
LAYERS = (
    ("cli", "__main__", "configs"),
    ("sweeps", "leaderboard", "training", "sampling.predict"),
    ("evaluation", "model"),
    ("pretrained", "finetuning"),
    ("calibration", "sampling"),
    ("conditions", "expression"),
    ("networks", "flow"),
    # Every layer may import these; they import each other and the lowest layer.
    ("data", "simulation", "perturbench"),
    ("labels", "annotations", "files", "console", "errors"),
)
HEIGHT = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Path of every module of the package by its full name."""
    found = {}
    for top, root in ((PACKAGE, SOURCE), (f"{PACKAGE}.configs", CONFIGS)):
        for path in root.rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join([top, *parts]).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path, known: set[str]) -> Iterator[str]:
    """Modules of ours that a module imports, anywhere in its text."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                if full in known:
                    yield full
                elif base in known:
                    yield base


def import_graph() -> dict[str, set[str]]:
    """Imported modules of ours by importer, without the top of the package, which shows names of others."""
    found = modules()
    graph = {name: set(imports(name, path, set(found))) - {PACKAGE, name} for name, path in found.items()}
    graph.pop(PACKAGE)
    return graph


def short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")


def unit(module: str) -> str:
    """The name in `LAYERS` that a module belongs to, the longest that fits."""
    parts = module.split(".")[1:]
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((name for name in names if name in HEIGHT), "")


def cyclic_imports(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Imports that are part of a cycle, as (importer, imported)."""

    def reachable(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    return {(name, other) for name, each in graph.items() for other in each if name in reachable(other)}


def test_every_module_belongs_to_a_layer():
    graph = import_graph()
    assert len(graph) > 60
    assert [name for name in graph if not unit(name)] == [], "add these to LAYERS"


def test_imports_point_down_only():
    upward = {
        (short(name), short(imported))
        for name, each in import_graph().items()
        for imported in each
        if HEIGHT[unit(imported)] > HEIGHT[unit(name)]
    }
    assert upward == set(), "these imports point up"


def test_there_are_no_import_cycles():
    cycles = {(short(name), short(other)) for name, other in cyclic_imports(import_graph())}
    assert cycles == set(), "these imports are part of a cycle"


def test_there_are_no_cycles_between_folders():
    folders: dict[str, set[str]] = {}
    for name, each in import_graph().items():
        folders.setdefault(unit(name), set()).update({unit(other) for other in each} - {unit(name)})
    assert cyclic_imports(folders) == set()


def test_embedded_perturbench_imports_nothing_of_ours():
    graph = import_graph()
    inside = {name: each for name, each in graph.items() if name.startswith(EMBEDDED)}
    assert inside
    assert {(name, other) for name, each in inside.items() for other in each if not other.startswith(EMBEDDED)} == set()


def test_only_perturbench_imports_its_embedded_subset():
    importers = {
        short(name)
        for name, each in import_graph().items()
        if not name.startswith(f"{PACKAGE}.perturbench") and any(other.startswith(EMBEDDED) for other in each)
    }
    assert importers == set(), "use perturbench.backend.load, or a module of ours"


def test_long_functions_give_a_reason():
    """A function of more than 60 lines, docstring included, has a comment above it that says why."""
    unexplained, long = [], 0
    for path in SOURCE.rglob("*.py"):
        lines = path.read_text().splitlines()
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 60:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                long += 1
                if not lines[first - 2].strip().startswith("# Long because"):
                    unexplained.append(f"{path.name}: {node.name}")
    assert unexplained == []
    assert long, "the test looks at nothing"


def test_the_model_is_hooks_and_steps_only():
    assert len((SOURCE / "model.py").read_text().splitlines()) <= 300
