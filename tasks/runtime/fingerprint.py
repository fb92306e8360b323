"""The fingerprint of code and libraries in a cache key, so that no version has to be raised by hand.

A stage's fingerprint covers the definitions that its function reaches: functions, classes, and constants of this
project. They are read from the source without importing it, so that editing `verify` does not rerun `untie`. Comments,
docstrings, and formatting are not part of it, nor are modules that cannot affect a result (MACHINERY). It also contains
the versions of the libraries that those definitions import, Python's version, and the CPU architecture.

When in doubt, code is included: a module that is used in any way other than `module.name` is included as a whole, and
so are the statements that run on import. A definition that is reached only through a computed name
(`getattr(module, name)`) is not included: use its name, or the string "module:function".

The number of threads and the model of the CPU or the GPU are not included. They change at most the last bits of a sum,
far less than an evaluation's standard error, and the machines of a pool should share their results.
"""

import ast
import functools
import hashlib
import importlib.util
import platform
import re
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypedDict

# Modules that transport results and errors without affecting them: the data that they store and move is verified by its
# digest.
MACHINERY = frozenset(
    f"quantize_gemma.tasks.runtime.{name}"
    for name in (
        "artifact_ref",
        "disk",
        "errors",
        "fingerprint",
        "hub",
        "hub_client",
        "hub_errors",
        "lifetime",
        "machine",
        "reporting",
        "prefect_cluster",
        "prefect_progress",
        "prefect_slots",
        "prefect_stage",
        "pruning",
        "redact",
        "retries",
        "stage",
        "store",
        "store_layout",
        "worker",
        "worker_main",
    )
)
# Checks, which write nothing: their code is included, so that a new check is applied to what is in the store. The
# libraries that they use are not: a new version of one should not cause an 8 GB model to be downloaded again.
CHECKS = frozenset(
    {
        "quantize_gemma.tasks.models.checkpoint:check_finite",
        "quantize_gemma.tasks.models.config",
        "quantize_gemma.tasks.models.load_check",
    }
)
# Names of libraries on PyPI that differ from their import names.
DISTRIBUTIONS = {"PIL": "pillow", "optimum": "optimum-executorch", "yaml": "pyyaml"}
# Libraries that do work for the imported ones; not all of their requirements, because the others do not affect results.
UNDERLYING = {
    "executorch": ("flatbuffers",),
    # Datasets are parquet files, and their prompts are templates.
    "lm-eval": ("datasets", "jinja2", "pyarrow"),
    "matplotlib": ("numpy", "pillow"),
    "numba": ("llvmlite", "numpy"),
    "optimum-executorch": ("optimum",),
    # Tokens, chat templates, and images; and loading the weights into the model.
    "transformers": ("accelerate", "jinja2", "numpy", "pillow", "safetensors", "tokenizers"),
}
# The packages whose source is included; the tests define stages, too.
PACKAGES = ("benchmarks", "quantize_gemma", "tests")
FUNCTION = re.compile(r"[a-zA-Z_]\w*(\.\w+)+:\w+")
FILE = re.compile(r"[\w-]+(\.[\w-]+)+")
# Names for the statements of a module that run on import, and for the whole module.
EFFECTS, WHOLE_MODULE = "", "*"

Definition = tuple[str, str]


class Fingerprint(TypedDict):
    """Everything that affects a stage's output besides its inputs, as JSON values.

    Attributes:
        code: The digest of the code of this project.
        libraries: The versions of the libraries.
        python: Python's version.
        machine: The CPU architecture.
    """

    code: str
    libraries: dict[str, str]
    python: str
    machine: str


@functools.cache
def fingerprint(*functions: str) -> Fingerprint:
    """Return the fingerprint of functions "module:name" and everything that they reach.

    Equal code and versions give equal fingerprints on any machine.

    Raises:
        LookupError: There is no such function.
    """
    names = reachable_definitions(*functions)
    lines = sorted(line for name in names for line in _facts(*name).contents)
    return {
        "code": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "libraries": versions(libraries(names)),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "machine": platform.machine(),
    }


def versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed libraries, without the local part, such as +cpu."""
    return {name: version(name).split("+")[0] for name in names}


def difference(expected: Fingerprint, actual: Fingerprint) -> str | None:
    """Describe the first difference between two fingerprints; None if they are equal."""
    for library, expected_version in expected["libraries"].items():
        if actual["libraries"].get(library) != expected_version:
            return f"{library} {actual['libraries'].get(library)} instead of {expected_version}"
    if actual["python"] != expected["python"]:
        return f"Python {actual['python']} instead of {expected['python']}"
    if actual["machine"] != expected["machine"]:
        return f"a processor of type {actual['machine']} instead of {expected['machine']}"
    return None if actual == expected else "a different version of quantize-gemma"


def reachable_definitions(*functions: str) -> set[Definition]:
    """Return the definitions, as (module, name), that the functions "module:name" reach."""
    pending: list[Definition] = []
    for function in functions:
        module, name = function.split(":")
        if name not in _module(module).definitions:
            raise LookupError(f"there is no function {name} in the source of {module}")
        pending.append((module, name))
    definitions: set[Definition] = set()
    while pending:
        module, name = pending.pop()
        if (module, name) not in definitions and module not in MACHINERY:
            definitions.add((module, name))
            pending += _facts(module, name).references
    return definitions


def libraries(names: Iterable[Definition]) -> list[str]:
    """Return the libraries that these definitions import, and those that do work for them, by their names on PyPI."""
    definitions = [name for name in names if not CHECKS & {name[0], ":".join(name)}]
    modules = {top for name in definitions for top in _facts(*name).libraries}
    direct = {DISTRIBUTIONS.get(top, top.replace("_", "-")) for top in modules}
    return sorted(direct | {library for name in direct for library in UNDERLYING.get(name, ())})


@dataclass(frozen=True)
class _Facts:
    """The dependencies of a definition.

    Attributes:
        references: The definitions in this project that it refers to.
        libraries: The libraries that it imports.
        contents: Lines with the digests of its code and of the files that it names.
    """

    references: frozenset[Definition]
    libraries: frozenset[str]
    contents: tuple[str, ...]


class _Module:
    """The source of a module: the statements of its definitions, those that run on import, and its imports."""

    def __init__(self, path: Path) -> None:
        tree = _parse(path.read_text(encoding="utf-8"))
        _drop_docstrings(tree)
        self.path = path
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.effects: list[ast.stmt] = []
        imports: list[ast.stmt] = []
        for node in tree.body:
            names = _defined_names(node)
            if isinstance(node, ast.FunctionDef):
                # How a stage is run does not affect its result.
                node.decorator_list = [decorator for decorator in node.decorator_list if not _declares_stage(decorator)]
            for name in names:
                self.definitions.setdefault(name, []).append(node)
            if isinstance(node, ast.Import | ast.ImportFrom):
                imports.append(node)
            elif not names and not isinstance(node, ast.Pass) and not _is_skipped_on_import(node):
                self.effects.append(node)
        self.imports = dict(_bindings(imports))


# Python 3.11 counts the depth of all threads' syntax trees together, and raises SystemError if a garbage collection
# lets two threads build one at the same time (CPython issue 106905).
_parse_lock = threading.Lock()


def _parse(source: str) -> ast.Module:
    with _parse_lock:
        return ast.parse(source)


@functools.cache
def _module(name: str) -> _Module:
    path = _find(name)
    if path is None:
        raise LookupError(f"there is no source of {name}")
    return _Module(path)


@functools.cache
def _facts(module: str, name: str) -> _Facts:
    source = _module(module)
    if name == WHOLE_MODULE:
        names = [*source.definitions, EFFECTS]
        return _Facts(frozenset((module, defined_name) for defined_name in names), frozenset(), ())
    statements = source.effects if name == EFFECTS else source.definitions[name]
    nodes = [node for statement in statements for node in ast.walk(statement)]
    local = dict(_bindings(nodes))
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    imported_modules = {target for target, _ in local.values()}
    if name == EFFECTS:
        # `import library.part` may be needed for what it registers.
        imported_modules |= {
            target
            for bound_name, (target, part) in source.imports.items()
            if part is None and target.startswith(f"{bound_name}.")
        }
    # A definition's module is imported before it runs, along with everything that the module imports.
    loaded_modules = {module, *imported_modules, *(target for target, _ in source.imports.values())}
    references = {(package, EFFECTS) for loaded_module in loaded_modules for package in _packages(loaded_module)}
    for used_name, attribute in _used_names(nodes):
        for imports in (local, source.imports):
            if used_name in imports:
                imported_modules.add(imports[used_name][0])
                references.update(_resolve(imports[used_name], attribute))
        if used_name in source.definitions:
            references.add((module, used_name))
    for text in texts:
        if FUNCTION.fullmatch(text) and _find(text.split(":")[0]):
            references.add((text.split(":")[0], text.split(":")[1]))
    contents = {name: "".join(map(ast.dump, statements)).encode()}
    for text in texts:
        if FILE.fullmatch(text) and (source.path.parent / text).is_file():
            contents[text] = (source.path.parent / text).read_bytes()
    return _Facts(
        references=frozenset(references),
        libraries=frozenset(
            {target.split(".")[0] for target in imported_modules if not _find(target)} - sys.stdlib_module_names
        ),
        contents=tuple(
            f"{module}:{part} {hashlib.sha256(content).hexdigest()}" for part, content in contents.items() if content
        ),
    )


@functools.cache
def _find(name: str) -> Path | None:
    """Return the source file of a module in this project, without importing it; None for any other module."""
    top, *parts = name.split(".")
    spec = importlib.util.find_spec(top) if top in PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def _packages(module: str) -> list[str]:
    """Return the packages that contain a module of this project, and the module itself."""
    parts = module.split(".")
    names = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return [name for name in names if _find(name)]


def _resolve(target: tuple[str, str | None], attribute: str | None) -> Iterator[Definition]:
    """Yield the definitions in this project of an imported name, or of an attribute of it."""
    module, name = target
    if not _find(module):
        return
    if name is not None and _find(f"{module}.{name}"):
        module, name = f"{module}.{name}", None
    if name is None:
        yield module, attribute if attribute in _module(module).definitions else WHOLE_MODULE
    elif name in _module(module).definitions:
        yield module, name
    else:
        # The name may be one that this module imports.
        yield from _resolve(_module(module).imports[name], attribute)


def _bindings(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """Yield (name, (module, name in it or None)) for each name that import statements among the nodes bind."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], (alias.name, None)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if node.module is None or node.level or alias.name == "*":
                    raise LookupError(f"import each name, from its full module, instead of: {ast.unparse(node)}")
                yield alias.asname or alias.name, (node.module, alias.name)


def _defined_names(node: ast.stmt) -> list[str]:
    """Return the names that a top-level statement defines; none if it does something else."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    parts = [part for target in targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])]
    names = [part.id for part in parts if isinstance(part, ast.Name)]
    return names if len(names) == len(parts) else []


def _used_names(nodes: list[ast.AST]) -> Iterator[tuple[str, str | None]]:
    """Yield (name, attribute or None) for each name that is read, with the attribute that is read from it."""
    attributes = {id(node.value): node.attr for node in nodes if isinstance(node, ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id, attributes.get(id(node))


def _declares_stage(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "stage"


def _is_skipped_on_import(node: ast.stmt) -> bool:
    """Tell whether a statement is `if __name__ == "__main__"`, or imports what only type checkers need."""
    return isinstance(node, ast.If) and re.search("__name__|^TYPE_CHECKING$", ast.unparse(node.test)) is not None


def _drop_docstrings(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:] or [ast.Pass()]
