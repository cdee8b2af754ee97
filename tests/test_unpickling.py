"""Nothing unpickles, and no text becomes code: a scan of everything that is installed.

Unpickling runs whatever the bytes say. The check is a function from a text to complaints, so that
it can be tried on texts with faults.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("common", "ps", "worker", "deploy")
MODULES = (
    "pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "jsonpickle", "marshal",
    "shelve", "xmlrpc", "torch.distributed.rpc", "torch.multiprocessing",
    "multiprocessing.connection", "multiprocessing.managers", "multiprocessing.pool",
    "multiprocessing.queues", "multiprocessing.reduction", "multiprocessing.shared_memory",
)  # fmt: skip
"""Modules that unpickle, or run what they read."""
HARMLESS = ("active_children",)
"""What may be taken from `multiprocessing`, whose pipes and queues unpickle."""
CALLS = ("eval", "exec", "compile", "__import__")
ATTRIBUTES = ("recv_pyobj", "send_pyobj", "find_class", "Unpickler", "read_pickle")
LOADERS = {"load": "weights_only"}
"""Functions of torch that unpickle unless this argument is True."""


def complaints(text: str) -> list[str]:
    """What of a module's text unpickles or runs text, by line."""
    return [f"{line}: {what}" for line, what in sorted(_found(ast.parse(text)))]


def _found(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, name.name) for name in names if _is_bad(name.name))
            case ast.ImportFrom(module=str(module), names=names):
                whole = [f"{module}.{name.name}" for name in names]
                yield from ((node.lineno, name) for name in [module, *whole] if _is_bad(name))
            case ast.Call(func=ast.Name(id=name)) if name in CALLS:
                yield node.lineno, f"{name}()"
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)) if (
                name in LOADERS and not _is_given(node, LOADERS[name])
            ):
                yield node.lineno, f"torch.{name}() without {LOADERS[name]}=True"
            case ast.Attribute(attr=name) if name in ATTRIBUTES:
                yield node.lineno, name
            case ast.keyword(arg="allow_pickle", value=value) if not _is_constant(value, False):
                yield node.value.lineno, "allow_pickle"
            case ast.keyword(arg="weights_only", value=value) if not _is_constant(value, True):
                yield node.value.lineno, "weights_only that is not True"
            case ast.Attribute(value=ast.Name(id="multiprocessing"), attr=name) if (
                name not in HARMLESS
            ):
                yield node.lineno, f"multiprocessing.{name}"
            case ast.Constant(value=str(name)) if name in MODULES:
                yield node.lineno, f"the name {name!r}, as importlib takes it"


def _is_bad(module: str) -> bool:
    return any(module == bad or module.startswith(f"{bad}.") for bad in MODULES)


def _is_given(call: ast.Call, name: str) -> bool:
    return any(word.arg == name and _is_constant(word.value, True) for word in call.keywords)


def _is_constant(node: ast.expr, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def files() -> list[Path]:
    """Every module that is installed."""
    return [file for source in SOURCES for file in sorted((ROOT / source).rglob("*.py"))]


def test_nothing_that_is_installed_unpickles_or_runs_text() -> None:
    found = {str(file.relative_to(ROOT)): complaints(file.read_text("utf-8")) for file in files()}
    assert len(found) > 150, "the scan has to see the whole package"
    assert {name: what for name, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import pickle as harmless",
        "from pickle import loads",
        "import cloudpickle",
        "from multiprocessing.connection import Client",
        "import multiprocessing\nmultiprocessing.Pipe()",
        "from multiprocessing import connection",
        "from torch.distributed.rpc import rpc_sync",
        "importlib.import_module('pickle')",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "torch.load(file, weights_only=flag)",
        "numpy.load(file, allow_pickle=True)",
        "sock.recv_pyobj()",
        "pandas.read_pickle(file)",
        "eval(text)",
        "exec(text)",
        "def inner():\n    import dill",
    ],
)
def test_a_text_that_unpickles_would_be_noticed(text: str) -> None:
    assert complaints(text)


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(file, weights_only=True)",
        "numpy.load(file, allow_pickle=False)",
        "import json\njson.loads(text)",
        "re.compile(pattern)",
        "model.eval()",
        "import multiprocessing\nmultiprocessing.active_children()",
        "'nothing is pickled'",
    ],
)
def test_a_text_that_does_not_is_let_pass(text: str) -> None:
    assert complaints(text) == []
