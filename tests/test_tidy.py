"""House rules that no tool checks: sizes, forbidden names, docstrings, the layout of packages.

A check is a function from one module to its faults. Each comes with a module in which a fault was
planted (`PLANTED`) and one that is right (`SOUND`), so that a check that finds nothing is known to
look, and one that finds something is known not to find everything.
"""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE_ROOTS = ("common", "ps", "worker", "deploy")
SCRIPT_ROOTS = ("tests", "bench", "examples")
SUBPACKAGES = (
    "checkpoint", "cli", "common", "launch", "scheduler", "server", "torch", "transport", "wire",
    "worker",
)  # fmt: skip
ROLES = ("ps/treefold/scheduler", "ps/treefold/server", "worker/treefold/worker")

FUNCTION_LINES_MAX = 70
MODULE_LINES_MAX = 500
PARAMETERS_MAX = 5
TEST_WORDS_MIN = 4

# What a user calls with keywords: each is a choice of its own with a default, as in torch itself.
USER_FACING = "worker/treefold/torch/"
# Modules that run what they read, and torch's loader, which unpickles; clocks that jump.
FORBIDDEN = (
    "cloudpickle", "dill", "marshal", "pickle", "shelve", "torch.load", "time.time", "time.time_ns",
    "datetime.now", "eval", "exec", "recv_pyobj", "send_pyobj", "allow_pickle",
)  # fmt: skip
# Where decisions are made: a set has no order there, or two runs of one seed would differ.
DECIDING = (*ROLES, "common/treefold/common", "common/treefold/wire")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Module:
    """One file of ours: its path from the root of the repository, its text and its tree."""

    path: str
    text: str
    tree: ast.Module

    @property
    def is_product(self) -> bool:
        """Whether it is installed, unlike tests, examples and benchmarks."""
        return self.path.split("/")[0] in SOURCE_ROOTS

    def functions(self) -> Iterator[Function]:
        """Every function and method."""
        return (node for node in ast.walk(self.tree) if isinstance(node, Function))

    def fault(self, node: ast.AST, text: str) -> str:
        """A complaint with its place."""
        return f"{self.path}:{getattr(node, 'lineno', 1)}: {text}"


def parse(text: str, path: str = "ps/treefold/server/core.py") -> Module:
    """A module from its text."""
    return Module(path, text, ast.parse(text))


@cache
def modules() -> list[Module]:
    """Every Python file of ours."""
    roots = (*SOURCE_ROOTS, *SCRIPT_ROOTS)
    files = sorted(file for root in roots for file in (ROOT / root).rglob("*.py"))
    return [parse(f.read_text(encoding="utf-8"), f.relative_to(ROOT).as_posix()) for f in files]


# ---- sizes ---------------------------------------------------------------------------------------


def docstring_lines(function: Function) -> int:
    """Lines that a function's docstring takes."""
    if ast.get_docstring(function) is None:
        return 0
    first = function.body[0]
    return (first.end_lineno or first.lineno) - first.lineno + 1


def long_functions(module: Module) -> Iterator[str]:
    """Functions that do not fit a screen, docstrings left out."""
    for function in module.functions():
        lines = (function.end_lineno or 0) - function.lineno + 1 - docstring_lines(function)
        if lines > FUNCTION_LINES_MAX:
            yield module.fault(function, f"{function.name} has {lines} lines")


def long_modules(module: Module) -> Iterator[str]:
    """Modules that are too long."""
    lines = len(module.text.splitlines())
    if lines > MODULE_LINES_MAX:
        yield module.fault(module.tree, f"the module has {lines} lines")


def crowded_calls(module: Module) -> Iterator[str]:
    """Functions with too many parameters; ``self`` and ``cls`` do not count."""
    for function in module.functions():
        given = function.args
        positional = [a.arg for a in (*given.posonlyargs, *given.args)]
        names = [name for name in positional if name not in ("self", "cls")]
        if not module.path.startswith(USER_FACING) or function.name.startswith("_"):
            names += [argument.arg for argument in given.kwonlyargs]
        if len(names) > PARAMETERS_MAX:
            yield module.fault(function, f"{function.name} takes {len(names)} parameters")


# ---- words ---------------------------------------------------------------------------------------


def comments(module: Module) -> Iterator[tuple[int, str]]:
    """Line number and text of every comment."""
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def loose_ends(module: Module) -> Iterator[str]:
    """Notes to oneself, unless they name an issue: ``TODO(#12)``."""
    for line, text in comments(module):
        if re.search(r"\b(FIXME|XXX|HACK)\b|\bTODO\b(?!\(#\d+\))", text):
            yield f"{module.path}:{line}: {text}"


def unexplained_ignores(module: Module) -> Iterator[str]:
    """Silenced type errors without a code and a reason."""
    for line, text in comments(module):
        if "type: ignore" in text and not re.search(r"type: ignore\[[\w, -]+\]\s+# \S", text):
            yield f"{module.path}:{line}: {text} (code and reason, please)"


def undocumented(module: Module) -> Iterator[str]:
    """Public modules, classes, functions and methods of the product without a docstring."""
    if not module.is_product:
        return
    waiting: list[ast.AST] = [module.tree]
    while waiting:
        node = waiting.pop()
        if not isinstance(node, ast.Module | ast.ClassDef | Function):
            continue
        name = "the module" if isinstance(node, ast.Module) else node.name
        if name.startswith("_"):
            continue
        if ast.get_docstring(node) is None:
            yield module.fault(node, f"{name} has no docstring")
        if not isinstance(node, Function):
            waiting += node.body


def short_test_names(module: Module) -> Iterator[str]:
    """Tests whose name is not a sentence."""
    for function in module.functions():
        words = function.name.split("_")
        is_test = words[0] == "test" and module.path.startswith("tests/")
        if is_test and len(words) <= TEST_WORDS_MIN:
            yield module.fault(function, f"{function.name} is not a sentence")


# ---- what may not be done ------------------------------------------------------------------------


def does_nothing(statement: ast.stmt) -> bool:
    """Whether a statement is ``pass``, ``...`` or a mere text."""
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return isinstance(statement, ast.Pass) or is_constant


def silent_handlers(module: Module) -> Iterator[str]:
    """Handlers that catch everything, or that do nothing with what they caught."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ExceptHandler):
            if node.type is None:
                yield module.fault(node, "a bare except")
            elif all(map(does_nothing, node.body)):
                yield module.fault(node, f"{ast.unparse(node.type)} is caught in silence")
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("suppress"):
            kinds = [dotted(kind) for kind in node.args]
            if "Exception" in kinds or "BaseException" in kinds:
                yield module.fault(node, "everything is suppressed")


def dotted(node: ast.AST) -> str:
    """A chain of names such as ``torch.load``; other expressions count as one nameless link."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def names_used(node: ast.AST) -> list[str]:
    """Dotted names that a node uses, imports among them."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    if isinstance(node, ast.Attribute | ast.Name):
        return [dotted(node)]
    return [node.arg or ""] if isinstance(node, ast.keyword) else []


def forbidden_names(module: Module) -> Iterator[str]:
    """Uses of what unpickles, evaluates text or reads a clock that jumps."""
    for node in ast.walk(module.tree):
        for name in names_used(node):
            for bad in FORBIDDEN:
                is_part = name == bad or name.startswith(f"{bad}.")
                is_method = "." in name and name.endswith(f".{bad}") and bad not in ("eval", "exec")
                if is_part or is_method:
                    yield module.fault(node, f"{bad} must not be used")


def sleeping_tests(module: Module) -> Iterator[str]:
    """Sleeps in tests that need no other process."""
    if module.path.startswith(("tests/unit/", "tests/sim/")):
        for node in ast.walk(module.tree):
            if "time.sleep" in names_used(node):
                yield module.fault(node, "a test that sleeps")


class SetUses(ast.NodeVisitor):
    """Finds iteration over sets in one function: their order differs from run to run.

    A heuristic without types: a name counts as a set if it is one in any assignment or annotation
    of the same function, an attribute if it is in the same module. Sorting, measuring and
    membership are fine.
    """

    ORDERED = ("dict.fromkeys", "enumerate", "iter", "list", "map", "next", "tuple", "zip")
    UNORDERED = ("all", "any", "frozenset", "max", "min", "set", "sorted")

    def __init__(self, attributes: set[str], scope: ast.AST) -> None:
        self.known = attributes | set_names(scope, ast.Name)
        self.found: list[ast.AST] = []

    def is_set(self, node: ast.AST) -> bool:
        """Whether an expression makes or names a set."""
        match node:
            case ast.Set() | ast.SetComp():
                return True
            case ast.Call(func=ast.Name(id="set" | "frozenset")):
                return True
            case ast.Call(func=ast.Attribute(value=inner, attr="union" | "difference" | "copy")):
                return self.is_set(inner)
            case ast.BinOp(left=left, right=right):
                return self.is_set(left) or self.is_set(right)
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return name in self.known
        return False

    def visit_For(self, node: ast.For) -> None:
        """A loop over a set."""
        self.found += [node] if self.is_set(node.iter) else []
        self.generic_visit(node)

    def visit_Starred(self, node: ast.Starred) -> None:
        """A set that is unpacked."""
        self.found += [node] if self.is_set(node.value) else []
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """A set that is given an order, or comprehended into something that has none."""
        name = dotted(node.func)
        if name in self.ORDERED or name.endswith((".join", ".extend")):
            self.found += [inner for inner in node.args if self.is_set(inner)]
        elif name.endswith(".pop") and not node.args and isinstance(node.func, ast.Attribute):
            self.found += [node] if self.is_set(node.func.value) else []
        elif name in self.UNORDERED and node.args and isinstance(node.args[0], ast.GeneratorExp):
            self.visit(node.args[0].elt)
            return
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        """A comprehension over a set."""
        self.found += [node.iter] if self.is_set(node.iter) else []
        self.generic_visit(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        """A set made of a set has no order to lose."""
        self.visit(node.elt)


def set_names(scope: ast.AST, kind: type[ast.Name] | type[ast.Attribute]) -> set[str]:
    """Names (or attributes) to which a set is assigned, or that are annotated as one."""
    found: set[str] = set()
    for node in ast.walk(scope):
        targets: list[ast.expr] = []
        if isinstance(node, ast.AnnAssign) and re.match(
            r"(frozen)?set\b", ast.unparse(node.annotation)
        ):
            targets = [node.target]
        elif isinstance(node, ast.Assign) and re.match(
            r"\{(?!\*\*)[^:]*\}$|(frozen)?set\(", ast.unparse(node.value)
        ):
            targets = node.targets if ast.unparse(node.value) != "{}" else []
        for target in targets:
            if isinstance(target, kind):
                found.add(target.id if isinstance(target, ast.Name) else target.attr)
    return found


def iterated_sets(module: Module) -> Iterator[str]:
    """Iteration over a set where decisions are made."""
    if not module.path.startswith(DECIDING):
        return
    attributes = set_names(module.tree, ast.Attribute)
    for function in module.functions():
        uses = SetUses(attributes, function)
        for line in function.body:
            uses.visit(line)
        for node in uses.found:
            yield module.fault(node, f"{function.name} iterates a set")


# ---- every check on every module, and on a planted fault -----------------------------------------

Check = Callable[[Module], Iterator[str]]


def many_lines(count: int) -> str:
    """So many assignments."""
    return "\n".join(f"    a{n} = {n}" for n in range(count))


PLANTED: list[tuple[Check, str]] = [
    (long_functions, f"def f():\n{many_lines(70)}\n"),
    (long_modules, "a = 1\n" * 501),
    (crowded_calls, "def f(a, b, c, *, d, e, f): ...\n"),
    (crowded_calls, "class C:\n    def __init__(self, a, b, c, d, e, f): ...\n"),
    (loose_ends, "a = 1  # TODO: later\n"),
    (loose_ends, "a = 1  # FIXME\n"),
    (unexplained_ignores, "a = 1  # type: ignore[misc]\n"),
    (unexplained_ignores, "a = 1  # type: ignore\n"),
    (undocumented, "a = 1\n"),
    (undocumented, '"""M."""\ndef f(): ...\n'),
    (undocumented, '"""M."""\nclass C:\n    """C."""\n    def f(self): ...\n'),
    (silent_handlers, "try: f()\nexcept: g()\n"),
    (silent_handlers, "try: f()\nexcept Exception: pass\n"),
    (silent_handlers, "try: f()\nexcept OSError:\n    ...\n"),
    (silent_handlers, "with contextlib.suppress(Exception): f()\n"),
    (forbidden_names, "import pickle\n"),
    (forbidden_names, "from torch import load\n"),
    (forbidden_names, "torch.load(path)\n"),
    (forbidden_names, "socket.recv_pyobj()\n"),
    (forbidden_names, "eval('1')\n"),
    (forbidden_names, "from time import time\n"),
    (forbidden_names, "now = time.time()\n"),
    (forbidden_names, "numpy.load(path, allow_pickle=True)\n"),
    (iterated_sets, "def f():\n    for a in {1, 2}: g(a)\n"),
    (iterated_sets, "def f(b):\n    a = set(b)\n    return [c for c in a]\n"),
    (iterated_sets, "def f(b):\n    a: set[int] = b\n    return list(a)\n"),
    (iterated_sets, "def f(b):\n    return dict.fromkeys(frozenset(b))\n"),
    (iterated_sets, "def f(b):\n    return [*{c for c in b}]\n"),
    (iterated_sets, "class C:\n  def f(self): self.a = {1}\n  def g(self): self.a.pop()\n"),
]  # fmt: skip

SOUND: list[tuple[Check, str]] = [
    (long_functions, f'def f():\n    """One.\n\n{many_lines(70)}\n    """\n{many_lines(69)}\n'),
    (long_modules, "a = 1\n" * 500),
    (crowded_calls, "class C:\n    def f(self, a, b, c, *, d, e): ...\n"),
    (loose_ends, "a = 'TODO'  # TODO(#12): when that is decided\n"),
    (unexplained_ignores, "a = 1  # type: ignore[misc]  # the stub is wrong\n"),
    (undocumented, '"""M."""\ndef _f(): ...\ndef g():\n    """G."""\n    def h(): ...\n'),
    (silent_handlers, "try: f()\nexcept OSError as error: g(error)\n"),
    (forbidden_names, "model.eval()\ntime.monotonic_ns()\nsafetensors.torch.load_file(path)\n"),
    (iterated_sets, "def f(b):\n    a = set(b)\n    return sorted(a), len(a), 3 in a\n"),
    (iterated_sets, "def f(b):\n    return sorted(c for c in {1, 2}), [c for c in {1: 2}]\n"),
    (iterated_sets, "def f(b):\n    a = {}\n    return [c for c in a]\n"),
]  # fmt: skip

TEST_PLANTED: list[tuple[Check, str]] = [
    (sleeping_tests, "time.sleep(1)\n"),
    (sleeping_tests, "from time import sleep\n"),
    (short_test_names, "def test_codec_works(): ...\n"),
]

CHECKS = list(dict.fromkeys(check for check, _ in (*PLANTED, *TEST_PLANTED)))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_no_module_breaks_the_rule_against(check: Check) -> None:
    assert [fault for module in modules() for fault in check(module)] == []


@pytest.mark.parametrize(("check", "text"), PLANTED)
def test_a_planted_fault_is_found_by(check: Check, text: str) -> None:
    assert list(check(parse(text)))


@pytest.mark.parametrize(("check", "text"), TEST_PLANTED)
def test_a_fault_planted_in_a_test_is_found_by(check: Check, text: str) -> None:
    assert list(check(parse(text, "tests/unit/test_planted.py")))


@pytest.mark.parametrize(("check", "text"), SOUND)
def test_a_sound_module_is_left_in_peace_by(check: Check, text: str) -> None:
    assert list(check(parse(text))) == []


# ---- packages ------------------------------------------------------------------------------------


def package_faults(root: Path) -> list[str]:
    """What is wrong with the source roots under a folder: stray or missing package files."""
    faults = []
    for source in SOURCE_ROOTS:
        if (root / source / "treefold" / "__init__.py").exists():
            faults.append(f"{source}/treefold/__init__.py hides the other source roots")
        packages = sorted((root / source / "treefold").glob("[a-z]*/"))
        wanted = [package / name for package in packages for name in ("__init__.py", "py.typed")]
        missing = [file for file in wanted if not file.is_file()]
        faults += [f"{file.relative_to(root).as_posix()} is missing" for file in missing]
    return faults


def test_every_subpackage_is_one_and_the_namespace_is_none() -> None:
    assert package_faults(ROOT) == []
    found = [
        p.name for source in SOURCE_ROOTS for p in (ROOT / source / "treefold").glob("[a-z]*/")
    ]
    assert sorted(found) == sorted(SUBPACKAGES)


def test_a_stray_or_missing_package_file_is_found(tmp_path: Path) -> None:
    (tmp_path / "common" / "treefold" / "wire").mkdir(parents=True)
    (tmp_path / "common" / "treefold" / "__init__.py").touch()
    assert package_faults(tmp_path) == [
        "common/treefold/__init__.py hides the other source roots",
        "common/treefold/wire/__init__.py is missing",
        "common/treefold/wire/py.typed is missing",
    ]


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_a_core_that_decides_and_a_shell_that_acts(role: str) -> None:
    assert (ROOT / role / "shell.py").is_file()
    tree = ast.parse((ROOT / role / "core.py").read_text(encoding="utf-8"))
    [core] = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name.endswith("Core")]
    methods = [node.name for node in core.body if isinstance(node, Function)]
    assert {"handle", "next_deadline_ns", "check_invariants"} <= set(methods)
