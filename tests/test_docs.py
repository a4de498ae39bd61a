"""The documentation does what it says: its commands run, its examples work, its tables are complete.

A comment before a fenced block decides what becomes of it:

- ``<!-- test: run -->``: ``console`` runs the lines behind ``$`` and compares what they print, where ``…`` is anything;
  ``python`` and ``toml`` are written where their first line names a file (``# train.py``), else ``python`` runs.
- ``<!-- test: background -->``: the same for a command that goes on; it gets SIGTERM when the page ends.
- ``<!-- test: output -->``: what the Python block before prints.
- ``<!-- test: skip REASON -->``: nothing.

The blocks of one page run in order, in one folder. Without a comment, Python must compile and name only what there is,
TOML must parse, and commands must have the options that they are given.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import pytest
import torch
import typer

import cloister
from client_side.spawn import LocalNode
from cloister import quickstart
from cloister.exits import ExitCode
from cloister.main import COMMANDS
from protos import node_pb2, program_pb2, tensor_pb2
from server_side.accounts import Limits
from server_side.metrics import Metrics
from wire import errors, operators

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
GENERATED: Final = DOCS / "cli.md"  # `make lint` holds it to the commands
PAGES: Final = sorted({ROOT / "README.md", *DOCS.rglob("*.md")} - {GENERATED})
OURS: Final = ("cloister", "client_side", "server_side", "privacy", "provenance", "wire", "protos")
PORT: Final = "7700"  # in the text; a free one when it runs
ADDRESS: Final = "localhost:7700#sha256:…"
COMMAND_S: Final = 90.0

_FENCE: Final = re.compile(r"^(\s*)```(\w*)\s*$")
_DIRECTIVE: Final = re.compile(r"^\s*<!-- test: (run|background|output|skip \S.*) -->$")
_FILE: Final = re.compile(r"# ([\w.-]+\.(?:py|toml))\n")
_LINK: Final = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_TEST: Final = re.compile(r"`(tests/\w+\.py)::(\w+)`")


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    directive: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start, indent, language, directive = 0, "", "", ""
    for number, line in enumerate(lines, 1):
        fence = _FENCE.match(line)
        if start and fence and not fence[2]:
            text = "".join(f"{inner.removeprefix(indent)}\n" for inner in lines[start : number - 1])
            yield Block(page, start, language, directive, text)
            start, directive = 0, ""
        elif fence and not start:
            start, indent, language = number, fence[1], fence[2]
        elif not start and line.strip():
            found = _DIRECTIVE.match(line)
            assert found or "<!-- test" not in line, f"{page}:{number}: no such directive"
            directive = found[1] if found else ""
    assert not start, f"{page}:{start}: a block without an end"


BLOCKS: Final = [block for page in PAGES for block in blocks_of(page)]
UNMARKED: Final = [block for block in BLOCKS if not block.directive]
RUN: Final = sorted({block.page for block in BLOCKS if block.directive in ("run", "background")})


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# --- What runs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalNode]:
    """The node of all pages that start none themselves."""
    with LocalNode(tmp_path_factory.mktemp("node"), threads=1) as running:
        yield running


class Reader:
    """Follows one page to the letter, in a folder of its own."""

    def __init__(self, folder: Path, address: str = "") -> None:
        self.folder = folder
        self._port, self._address = _free_port(), address
        self._namespace: dict[str, Any] = {"__name__": "__docs__"}
        self._printed = ""
        self._going_on: list[subprocess.Popen[str]] = []
        self._environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "CLOISTER_PASSPHRASE": "a passphrase for tests",  # a reader is asked for one
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for process in self._going_on:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()

    def follow(self, block: Block) -> None:
        text = self._substituted(block.text) if block.directive != "output" else block.text
        named = _FILE.match(text)
        if block.directive == "output":
            assert_printed(block, block.text, self._printed)
        elif block.language in ("python", "toml") and named:
            (self.folder / named[1]).write_text(text, encoding="utf-8")
        elif block.language == "python":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec(compile(text, str(block), "exec"), self._namespace)  # noqa: S102 -- our own page
            self._printed = printed.getvalue()
        elif block.language == "console":
            for command, expected in commands_of(text):
                (self._start if block.directive == "background" else self._run)(block, command, expected)
        else:
            pytest.fail(f"{block}: {block.language or 'a plain block'} cannot run")

    def _substituted(self, text: str) -> str:
        if self._address:
            text = text.replace(ADDRESS, self._address)
        return text.replace(f":{PORT}", f":{self._port}")

    def _run(self, block: Block, command: str, expected: str) -> None:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            check=False,
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
        )
        assert done.returncode == 0 or "exit code" in expected, f"{block}: {command}\n{done.stderr}"
        assert_printed(block, expected, done.stdout)

    def _start(self, block: Block, command: str, expected: str) -> None:
        with (self.folder / "background.log").open("ab") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._going_on.append(process)
        assert process.stdout is not None
        printed = "".join(process.stdout.readline() for _ in expected.splitlines())
        assert printed, f"{block}: {(self.folder / 'background.log').read_text()}"
        assert_printed(block, expected, printed)
        shown = re.search(r"^address\s+(\S+)$", printed, re.MULTILINE)
        self._address = shown[1] if shown else self._address


def commands_of(text: str) -> list[tuple[str, str]]:
    """The commands of a console block and what it says that each prints."""
    pairs: list[tuple[str, str]] = []
    goes_on = False
    for line in text.splitlines():
        if goes_on:
            pairs[-1] = (f"{pairs[-1][0]}\n{line}", "")
        elif line.startswith("$ "):
            pairs.append((line[2:], ""))
        elif pairs:
            pairs[-1] = (pairs[-1][0], f"{pairs[-1][1]}{line}\n")
        goes_on = line.endswith("\\") and (goes_on or line.startswith("$ "))
    return pairs


def assert_printed(block: Block, expected: str, printed: str) -> None:
    """Nothing is compared where the page shows nothing."""
    if expected.strip():
        pattern = ".*?".join(re.escape(part) for part in _trimmed(expected).split("…"))
        assert re.fullmatch(pattern, _trimmed(printed), re.DOTALL), f"{block} says\n{expected}\nbut there is\n{printed}"


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _free_port() -> int:
    with socket.create_server(("localhost", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@pytest.mark.timeout(300)  # the tutorial starts seven processes, each of which takes seconds to import torch
@pytest.mark.parametrize("page", RUN, ids=page_id)
def test_what_a_page_says_works_as_it_says(
    page: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = [block for block in BLOCKS if block.page == page and block.directive.partition(" ")[0] not in ("", "skip")]
    monkeypatch.chdir(tmp_path)
    address = ""
    if any(ADDRESS in b.text for b in blocks) and not any(b.directive == "background" for b in blocks):
        shared: LocalNode = request.getfixturevalue("node")
        address = shared.address
        (tmp_path / "owner").symlink_to(shared.owner.folder)

    with torch.random.fork_rng(devices=[]), Reader(tmp_path, address) as reader:
        for block in blocks:
            reader.follow(block)


def test_the_tutorial_runs_from_the_first_key_to_the_saved_model() -> None:
    """What runs is decided by comments in the page: here, that they are there."""
    page = DOCS / "tutorial" / "first-training.md"
    blocks = [block for block in BLOCKS if block.page == page]

    assert [b.line for b in blocks if not b.directive] == []
    skipped = [b for b in blocks if b.directive.startswith("skip")]
    assert all("pip install" in b.text for b in skipped)
    assert {"run", "background"} <= {b.directive for b in blocks}


# --- What is only looked at -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [b for b in UNMARKED if b.language == "python"], ids=str)
def test_python_compiles_and_names_only_what_there_is(block: Block) -> None:
    tree = ast.parse(block.text, str(block))

    for name in names_of_ours(tree):
        assert exists(name), f"{block} names {name}"


def names_of_ours(tree: ast.AST) -> set[str]:
    found: set[str] = set()
    for item in ast.walk(tree):
        if isinstance(item, ast.Import):
            found |= {alias.name for alias in item.names}
        elif isinstance(item, ast.ImportFrom) and item.module:
            found |= {f"{item.module}.{alias.name}" for alias in item.names}
        elif isinstance(item, ast.Attribute) and isinstance(item.value, ast.Name) and item.value.id == "cloister":
            found.add(f"cloister.{item.attr}")
    return {name for name in found if name.split(".")[0] in OURS}


def exists(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
        return True
    return bool(module) and hasattr(importlib.import_module(module), attribute)


def test_names_that_there_are_not_are_found() -> None:
    tree = ast.parse("import cloister\nfrom wire import nothing\ncloister.cut\ncloister.nothing()\n")

    assert {name for name in names_of_ours(tree) if not exists(name)} == {"wire.nothing", "cloister.nothing"}


@pytest.mark.parametrize("block", [b for b in UNMARKED if b.language == "toml"], ids=str)
def test_toml_parses(block: Block) -> None:
    assert tomllib.loads(block.text)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("console", "sh")], ids=str)
def test_commands_take_the_options_that_the_page_gives_them(block: Block) -> None:
    lines = block.text.replace("\\\n", " ").splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]

    for line in prompted or lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        if words[:1] == ["make"]:
            assert f"{words[1]}:" in (ROOT / "Makefile").read_text(), f"{block}: {line}"
        if words[:1] == ["cloister"]:
            assert unknown_options(words[1:]) == [], f"{block}: {line}"


def unknown_options(words: list[str]) -> list[str]:
    """What a command line of ours says that no command knows."""
    if not words or words[0].startswith("-"):
        return [word for word in words if word not in ("--version", "--help")]
    if words[0] not in COMMANDS:
        return words[:1]
    command: Any = typer.main.get_command(importlib.import_module(f"cloister.commands.{words[0]}").app)
    rest = words[1:]
    if hasattr(command, "commands"):
        if not rest or rest[0] not in command.commands:
            return rest[:1]
        command, rest = command.commands[rest[0]], rest[1:]
    known = {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}
    return [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]


def test_options_that_there_are_not_are_found() -> None:
    assert unknown_options(shlex.split("node --identity node --nothing 1")) == ["--nothing"]
    assert unknown_options(["nothing"]) == ["nothing"]
    assert unknown_options(["keys", "nothing"]) == ["nothing"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_within_the_documentation_lead_somewhere(page: Path) -> None:
    for target in _LINK.findall(_prose(page)):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists() or file == GENERATED, f"{page_id(page)} links to {target}"
            assert not anchor or file == GENERATED or anchor in anchors_of(file), f"{page_id(page)} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_tests_that_a_page_names_are_there(page: Path) -> None:
    for file, name in _TEST.findall(_prose(page)):
        source = ROOT / file
        assert source.exists(), f"{page_id(page)} names {file}"
        assert re.search(rf"^def {name}\(", source.read_text(), re.MULTILINE), f"{page_id(page)} names {file}::{name}"


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_page_can_be_reached_from_the_index(page: Path) -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        here = waiting.pop()
        if here not in reached and here.suffix == ".md" and here.exists():
            reached.add(here)
            targets = [target.partition("#")[0] for target in _LINK.findall(_prose(here))]
            waiting += [(here.parent / t).resolve() for t in targets if t and not re.match(r"https?:", t)]

    assert page in reached


def _prose(page: Path) -> str:
    return re.sub(r"^\s*```.*?^\s*```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", _prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- What must be complete --------------------------------------------------------------------------------------------


def rows_of(page: str, columns: int, *, heading: str = "") -> list[list[str]]:
    """The table rows of a page, or of what stands under one of its headings, that begin with code."""
    text = (DOCS / page).read_text(encoding="utf-8")
    if heading:
        text = re.split(r"^## ", text.partition(f"\n## {heading}\n")[2], maxsplit=1, flags=re.MULTILINE)[0]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]
    assert rows, f"{page} has no table under {heading!r}"
    assert all(len(row) == columns for row in rows), [row for row in rows if len(row) != columns]
    return rows


def code(cell: str) -> str:
    return cell.strip("`")


def test_the_readmes_first_example_is_the_source_of_the_demo() -> None:
    first = next(block for block in BLOCKS if block.page == ROOT / "README.md" and block.language == "python")
    source = inspect.getsource(quickstart.train)

    before, found, after = first.text.partition(source)
    assert found
    assert not after.strip()
    assert all(line.startswith(("import ", "from ")) for line in before.splitlines() if line)


def test_every_wire_reason_is_documented_with_its_status() -> None:
    rows = rows_of("reference/errors.md", 5, heading="Reasons")

    told = {(code(row[0]), code(row[1]), code(row[2])) for row in rows}
    assert told == {(reason, cls.status.name, cls.__name__) for reason, cls in errors._BY_REASON.items()}


def test_every_error_that_stays_at_home_is_documented() -> None:
    rows = rows_of("reference/errors.md", 3, heading="Errors that never cross the wire")

    kinds = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.CloisterError)]
    home = {cls.__name__ for cls in kinds if cls is not errors.CloisterError and not issubclass(cls, errors.WireError)}
    assert {code(row[0]) for row in rows} == home


def test_every_exit_code_and_every_reason_has_its_remedy() -> None:
    page = "how-to/mend-a-connection.md"
    exits = {int(code(row[0])) for row in rows_of(page, 3, heading="Exit codes")}
    reasons = {code(row[0]) for row in rows_of(page, 2, heading="Reasons of a node")}

    assert exits == {code.value for code in ExitCode}
    assert reasons == set(errors._BY_REASON)


def test_every_limit_is_documented_with_its_default() -> None:
    rows = rows_of("reference/limits.md", 3, heading="Limits of a node")

    told = {code(row[0]): int(row[1].replace(",", "").split(" ")[0]) for row in rows}
    assert told == {field.name: getattr(Limits(), field.name) for field in fields(Limits)}


def test_every_fixed_bound_is_what_the_page_says() -> None:
    rows = [
        *rows_of("reference/limits.md", 3, heading="Fixed bounds"),
        *rows_of("reference/program.md", 3, heading="Bounds"),
    ]
    for name, value, _ in rows:
        module, _, constant = code(name).rpartition(".")
        assert float(value.replace(",", "").split(" ")[0]) == getattr(importlib.import_module(module), constant), name


def test_every_allowed_operator_is_listed_and_no_other() -> None:
    page = DOCS / "reference" / "program.md"
    before, start, rest = page.read_text(encoding="utf-8").partition("<!-- operators -->\n")
    listed, end, after = rest.partition("<!-- /operators -->\n")
    if os.environ.get("CLOISTER_UPDATE_DOCS") == "1":
        listed = operator_table()
        page.write_text(before + start + listed + end + after, encoding="utf-8")

    assert listed == operator_table(), "run this test with CLOISTER_UPDATE_DOCS=1, and look at what changed"


def operator_table() -> str:
    """The allow-list as Markdown, by initial; without an overload, the default one is meant."""
    ours = [operators.GETITEM, operators.SET_GRAD, *operators.SIZE_OPERATORS.values()]
    groups = {"`cloister::`": [name.removeprefix("cloister::") for name in ours]}
    for name in sorted(operators._PURE):
        groups.setdefault(f"`aten::` {name.strip('_')[0]}", []).append(name)
    groups["`aten::`, in place"] = list(operators._IN_PLACE)
    rows = [f"| {group} | {' '.join(f'`{name}`' for name in sorted(names))} |\n" for group, names in groups.items()]
    return "".join(["| | |\n|---|---|\n", *(rows[:1] + sorted(rows[1:-1]) + rows[-1:])])


def test_every_method_message_and_phase_of_the_wire_is_documented() -> None:
    wire, program = ((DOCS / "reference" / name).read_text(encoding="utf-8") for name in ("wire.md", "program.md"))

    methods = [method.name for method in node_pb2.DESCRIPTOR.services_by_name["Node"].methods]
    messages = [*node_pb2.DESCRIPTOR.message_types_by_name, *tensor_pb2.DESCRIPTOR.message_types_by_name]
    assert [name for name in [*methods, *messages, *node_pb2.Phase.keys()[1:]] if f"`{name}`" not in wire] == []
    kinds = [*program_pb2.DESCRIPTOR.message_types_by_name, *program_pb2.DESCRIPTOR.enum_types_by_name]
    assert [name for name in kinds if f"`{name}`" not in program] == []


def test_every_metric_is_documented_and_no_other() -> None:
    rows = rows_of("how-to/run-a-node.md", 2, heading="Watch it")

    families = [family for family in Metrics().registry.collect() if family.type != "unknown"]
    told = {code(row[0]).partition("{")[0] for row in rows}
    assert told == {family.name + ("_total" if family.type == "counter" else "") for family in families}


def test_every_public_name_is_in_the_reference() -> None:
    rows = rows_of("reference/python.md", 2)

    assert {code(row[0]) for row in rows} == set(cloister.__all__)
