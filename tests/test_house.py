"""The rules of the house that a test can hold: sizes, imports, names."""

from __future__ import annotations

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = ("di4c_fast", "kernels", "benchmarks", "examples", "tools", "tests")
FILES = sorted(
    path
    for folder in FOLDERS
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".cpp", ".h") and "__pycache__" not in path.parts
)
SOURCES = [path for path in FILES if path.suffix == ".py"]
# Calls whose signature is that of a public call of this package or of another repository.
PUBLIC = (
    "di4c_fast/loss/api.py",
    "di4c_fast/draw/api.py",
    "di4c_fast/training/step.py",
    "di4c_fast/integrations/",
)
SAMPLERS = "di4c_fast/samplers/"


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    return ".".join(("di4c_fast", *parts) if parts[0] == "kernels" else parts)


MODULES = {module_of(path): path for path in SOURCES}


def imports(path: pathlib.Path) -> list[tuple[str, str]]:
    """(module, name) of every import of a file, where it takes anything from this repository."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [(module, alias.name) for alias in node.names]
    return found


def needs(path: pathlib.Path) -> set[str]:
    """The modules of this repository that a file imports when it runs."""
    found = set()
    for module, name in imports(path):
        for candidate in (f"{module}.{name}", module):
            if candidate in MODULES and MODULES[candidate] != path:
                found.add(candidate)
                break
    return found


def test_files_are_short():
    long = {name_of(p): n for p in FILES if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_no_import_circles():
    graph = {module: needs(path) for module, path in MODULES.items()}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        if module in done:
            return
        assert module not in way, " -> ".join((*way[way.index(module) :], module))
        for other in sorted(graph[module]):
            visit(other, (*way, module))
        done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_no_file_takes_anothers_private_name():
    taken = [
        f"{name_of(path)}: {name} of {module}"
        for path in SOURCES
        for module, name in imports(path)
        if module.split(".")[0] in FOLDERS and name.startswith("_") and not name.startswith("__")
    ]
    assert not taken


def test_functions_have_few_parameters():
    long = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            a = node.args
            count = len(a.posonlyargs) + len(a.args) + len(a.kwonlyargs)
            kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            public = not node.name.startswith("_") and name_of(path).startswith((*PUBLIC, SAMPLERS))
            if count > 16 and not kernel and not public:
                long.append(f"{name_of(path)}:{node.name} has {count}")
    assert not long


def test_every_mutation_has_something_to_break():
    from tools.mutate_kernels import MUTATIONS

    stale = [m.name for m in MUTATIONS if m.before not in (ROOT / m.file).read_text("utf-8")]
    assert not stale
