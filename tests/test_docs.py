"""The documentation is complete: messages, errors, settings, commands; and its links hold.

Every check is a function from texts to complaints, so that it can be tried on a text with a fault.
"""

import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from treefold.common import errors, plan, spec
from treefold.common.config import KEYS, PREFIX, Settings
from treefold.wire import chain, codec, messages, words

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
ENUMS = (
    words.Role, words.Code, words.Outcome, words.Phase,
    spec.Dtype, spec.Rule, spec.Placement, spec.ConsistencyKind, spec.Compensation,
    spec.HealthPolicy, spec.Aggregation,
    plan.PlanKind,
)  # fmt: skip
STRUCTS = (
    words.Frame, words.Member, words.ShardPlace, words.TablePlace, words.Source,
    words.Leases, words.Need, words.Facts, words.Figure, spec.Consistency, spec.Guard,
    chain.KeptVersion, messages.PartMissing, spec.TensorSpec, spec.OptimizerSpec, spec.TableSpec,
    plan.LoopPlan,
)  # fmt: skip


def read(name: str) -> str:
    """A page of the documentation."""
    return (DOCS / name).read_text(encoding="utf-8")


# ---- the wire ------------------------------------------------------------------------------------


def heading_of(struct: type[msgspec.Struct]) -> str:
    """What the section of a message or struct is called on the wire page."""
    tag = struct.__struct_config__.tag
    return struct.__name__ if tag is None else f"{struct.__name__} (tag {tag})"


def wire_complaints(page: str, structs: Iterable[type[msgspec.Struct]]) -> list[str]:
    """Structs whose section is missing, or whose fields are not those of its table, in order."""
    sections = dict(re.findall(r"^### (.+?)\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL))
    complaints = []
    for struct in structs:
        body = sections.get(heading_of(struct))
        rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", body or "", re.MULTILINE)
        expected = [(str(number), name) for number, name in enumerate(struct.__struct_fields__)]
        if rows != expected:
            complaints.append(f"{heading_of(struct)}: {expected} expected, {rows} found")
    return complaints


def test_every_message_and_struct_of_the_wire_has_its_fields_on_the_wire_page() -> None:
    everything = [*get_args(codec.Header), *STRUCTS]
    assert wire_complaints(read("wire.md"), everything) == []


def test_a_missing_section_a_missing_field_and_a_swapped_one_would_be_noticed() -> None:
    page, push = read("wire.md"), [messages.Push]
    assert wire_complaints(page.replace("### Push (tag 40)", "### Push (tag 41)"), push)
    assert wire_complaints(re.sub(r"^\| 7 \| `round`.*\n", "", page, flags=re.MULTILINE), push)
    assert wire_complaints(page.replace("| 9 | `level`", "| 9 | `height`"), push)


def test_the_wire_page_describes_nothing_that_does_not_exist() -> None:
    described = re.findall(r"^### (.+)$", read("wire.md"), re.MULTILINE)
    everything = [*STRUCTS, *get_args(codec.Header)]
    assert sorted(described) == sorted(map(heading_of, everything))


def test_the_wire_page_has_every_number_of_every_enum() -> None:
    page = read("wire.md")
    for enum in ENUMS:
        [row] = re.findall(rf"^\| `{enum.__name__}` \|(.*)$", page, re.MULTILINE)
        found = {name: int(number) for number, name in re.findall(r"(\d+) `(\w+)`", row)}
        assert found == {member.name: member.value for member in enum}


def test_the_wire_page_has_every_limit_with_its_value() -> None:
    limits = {
        name: value
        for module in (plan, spec, words, messages, codec)
        for name, value in vars(module).items()
        if name.endswith("_MAX")
    }
    rows = re.findall(r"^\| `(\w+_MAX)` \| (\d+) \|", read("wire.md"), re.MULTILINE)
    assert {name: int(value) for name, value in rows} == limits


def test_the_wire_page_names_the_protocol_that_is_spoken() -> None:
    assert f"**protocol {words.PROTOCOL_VERSION}**" in read("wire.md")


# ---- errors and settings -------------------------------------------------------------------------


def rows_missing(page: str, names: Iterable[str]) -> list[str]:
    """Names that do not begin a row with something in its other cells."""
    described = re.findall(r"^\| `([\w.-]+)` \|(?=.*\w)", page, re.MULTILINE)
    return [name for name in names if name not in described]


def error_names() -> list[str]:
    """Every class of `treefold.common.errors`."""
    return [name for name, kind in vars(errors).items() if inspect.isclass(kind)]


def test_every_error_and_every_refusal_is_described() -> None:
    page = read("errors.md")
    assert rows_missing(page, error_names()) == []
    assert rows_missing(page, [code.name for code in words.Code]) == []


def test_every_error_is_in_the_tree_of_its_module_and_of_the_page() -> None:
    for text in (errors.__doc__ or "", read("errors.md")):
        assert [name for name in error_names() if name not in text] == []


def test_every_setting_is_described_with_its_default_flag_and_variable() -> None:
    page, defaults = read("config.md"), msgspec.to_builtins(Settings())
    for key in KEYS:
        value = defaults[key]
        default = str(value).lower() if isinstance(value, bool) else str(value)
        cells = [f"`{key}`", f"`{default}`", f"`--{key.replace('_', '-')}`"]
        row = " | ".join([*cells, f"`{PREFIX}{key.upper()}`"]).replace(" `` ", " ")
        assert f"| {row} |" in page


def test_a_name_without_a_row_would_be_noticed() -> None:
    assert rows_missing("| `ConfigError` | it happened |\n`DataError`\n", ["ConfigError"]) == []
    assert rows_missing("`DataError` is one\n| `X` | |\n", ["DataError", "X"]) == ["DataError", "X"]


# ---- the command line ----------------------------------------------------------------------------


def help_of(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    """What ``treefold WORDS --help`` prints."""
    main = importlib.import_module("treefold.cli.main").main
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["treefold", *words, "--help"])
    with pytest.raises(SystemExit) as ending:
        main()
    assert ending.value.code in (None, 0)
    return capsys.readouterr().out


def commands_in(help_text: str) -> list[str]:
    """Commands that a help text names in braces."""
    braces = re.search(r"\{([\w,-]+)\}", help_text)
    return braces.group(1).split(",") if braces else []


def flags_in(help_text: str) -> list[str]:
    """Long flags at the beginning of a help text's lines, without ``--help``."""
    found = re.findall(r"^\s+(?:-\w(?: \S+)?, )?(--[a-z][\w-]*)", help_text, re.MULTILINE)
    return [flag for flag in dict.fromkeys(found) if flag != "--help"]


def test_every_command_and_flag_is_described(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pages = read("cli.md") + read("config.md")
    commands = commands_in(help_of([], monkeypatch, capsys))
    assert {"run", "scheduler", "server", "worker", "status", "doctor"} <= set(commands)
    for command in commands:
        assert f"## treefold {command}" in pages
        flags = flags_in(help_of([command], monkeypatch, capsys))
        assert [
            flag for flag in flags if f"`{flag}`" not in pages and f"`{flag} " not in pages
        ] == []


@pytest.mark.parametrize("command", ["scheduler", "server", "worker"])
def test_what_is_started_by_hand_has_all_of_its_flags_in_its_section(command: str) -> None:
    flags = importlib.import_module(f"treefold.cli.{command}").FLAGS
    section = read("cli.md").partition(f"## treefold {command}\n")[2].partition("\n## ")[0]
    assert [key for key in flags if f"`--{key.replace('_', '-')}`" not in section] == []


def test_commands_and_flags_are_read_from_a_help_text() -> None:
    text = (
        "usage: treefold [-h] {run,status} ...\n\noptions:\n"
        "  -h, --help  show\n  --log-level X  say\n  -n N, --slots N  how many\n"
    )
    assert commands_in(text) == ["run", "status"]
    assert flags_in(text) == ["--log-level", "--slots"]


# ---- links ---------------------------------------------------------------------------------------


def anchors_of(page: str) -> list[str]:
    """The anchors that a page's headings make."""
    headings = re.findall(r"^#+ (.+)$", page, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in plain]


def dead_links(file: Path, page: str) -> list[str]:
    """Links of a page that lead to no file or no heading."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page):
        path, _, anchor = target.partition("#")
        if path.startswith(("http:", "https:", "mailto:")):
            continue
        there = file.parent / path
        is_other = bool(anchor and path) and there.is_file()  # pictures have no headings
        text = there.read_text(encoding="utf-8") if is_other else page
        if (path and not there.exists()) or (anchor and anchor not in anchors_of(text)):
            dead.append(f"{file.name}: {target}")
    return dead


def test_links_between_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
    assert [dead for file in pages for dead in dead_links(file, file.read_text("utf-8"))] == []


def test_a_dead_link_would_be_noticed() -> None:
    page = "# One\n[a](wire.md) [b](#one) [c](nowhere.md) [d](#two) [e](wire.md#nothing)\n"
    found = dead_links(DOCS / "page.md", page)
    assert found == ["page.md: nowhere.md", "page.md: #two", "page.md: wire.md#nothing"]
