"""The checkout itself: what the wheel ships, what `make` offers, and which protobuf the stubs load in."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any, Final

import pytest
import sqlalchemy as sa

from tests import conftest

ROOT: Final = Path(__file__).resolve().parents[1]
UNSHIPPED: Final = {"tests", "bench", "examples", "docs"}
UNCOPIED: Final = (".*", "__pycache__", "*.egg-info", "build", "dist", "node_modules")
VERBS: Final = ["help", "setup", "demo", "test", "lint", "protos", "bench", "docs", "clean"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in the wheel, built from a copy: setuptools leaves a build folder behind, and reads a stale one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*UNCOPIED))
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    _run(sys.executable, "-m", "pip", "wheel", *options, str(source))
    (built,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(built).namelist())


def test_the_wheel_ships_every_package_whole_and_nothing_else(wheel: set[str]) -> None:
    shipped = {name for name in wheel if ".dist-info/" not in name}

    folders = [ROOT / package for package in _packages()]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert shipped == {path.relative_to(ROOT).as_posix() for path in files}


def test_the_wheel_carries_the_types_the_protos_and_the_licence(wheel: set[str]) -> None:
    assert {"protos/node.proto", "protos/node_pb2.pyi", "protos/node_pb2_grpc.py"} <= wheel
    assert {f"{package}/py.typed" for package in _packages()} <= wheel
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in wheel)


def test_every_package_is_shipped_and_stands_in_the_layers() -> None:
    tools = _pyproject()["tool"]

    named = [pattern.removesuffix("*") for pattern in tools["setuptools"]["packages"]["find"]["include"]]
    layers = [part for layer in tools["importlinter"]["contracts"][0]["layers"] for part in layer.split(" | ")]
    assert sorted(named) == sorted(tools["importlinter"]["root_packages"]) == sorted(layers) == sorted(_packages())


def test_make_alone_prints_its_verbs() -> None:
    bare, asked = (_run("make", "--no-print-directory", *goal) for goal in ([], ["help"]))

    assert [line.split()[1] for line in bare.splitlines()] == VERBS
    assert bare == asked


def test_the_constraints_are_exact_and_cover_every_dependency() -> None:
    project = _pyproject()["project"]

    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    exact = {_name(pin) for pin in pins if pin.count("==") == 1 and "*" not in pin}
    assert len(exact) == len(pins)
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    assert {_name(requirement) for group in groups for requirement in group} - {"cloister"} <= exact


def test_an_auditors_installation_has_no_torch_in_it() -> None:
    """The base and the extra `audit` are all that an auditor installs; `pip install` of it is measured in the docs."""
    project = _pyproject()["project"]

    asked = {_name(each) for each in (*project["dependencies"], *project["optional-dependencies"]["audit"])}
    assert not asked & {"torch", "torchmetrics", "opacus", "kymatio", "matplotlib", "scikit-learn", "dp-accounting"}
    assert "torch" in {_name(each) for each in project["optional-dependencies"]["train"]}


@pytest.mark.parametrize("version", ["6.33.6", "7.36.2"])
def test_the_stubs_load_in_the_oldest_protobuf_and_in_the_next_major(version: str, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--retries=0", "--timeout=20"]
    got = subprocess.run(
        [*pip, "--target", tmp_path, f"protobuf=={version}"], check=False, capture_output=True, text=True
    )
    if got.returncode:
        said = got.stderr.strip().splitlines() or [f"pip ended with {got.returncode}"]
        pytest.skip(f"no protobuf {version} from the package index (let this machine reach it): {said[-1]}")
    script = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]\n"
        "import google.protobuf\n"
        "from protos import node_pb2, node_pb2_grpc, program_pb2, tensor_pb2\n"
        "frame = node_pb2.Frame(step=7, tensors=[tensor_pb2.Tensor(shape=[2, 3], data=b'x')])\n"
        "assert node_pb2.Frame.FromString(frame.SerializeToString()) == frame\n"
        "print(google.protobuf.__version__)\n"
    )

    assert _run(sys.executable, "-W", "error", "-c", script).strip() == version


def test_postgres_answers_where_it_is_installed(postgres_url: str) -> None:
    engine = sa.create_engine(postgres_url)

    with engine.connect() as connection:
        assert connection.scalar(sa.text("select current_user")) == "postgres"
    engine.dispose()


def _packages() -> set[str]:
    return {path.parent.name for path in ROOT.glob("*/__init__.py")} - UNSHIPPED


def _pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def _name(requirement: str) -> str:
    """The name that a requirement begins with, spelled as PEP 503 does."""
    name = requirement
    for separator in "[<>=":
        name = name.split(separator)[0]
    return name.strip().lower().replace("_", "-").replace(".", "-")


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [("Skipped: no PostgreSQL server here", "failed"), ("Skipped: no CUDA device here", "skipped")],
)
def test_where_none_may_be_skipped_a_skip_fails(
    reason: str, outcome: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    monkeypatch.setenv(conftest.NO_SKIPS, "1")
    report = pytest.TestReport("a", ("a", 1, "a"), {}, "skipped", ("a.py", 1, reason), "call")
    hook = conftest.pytest_runtest_makereport(request.node, pytest.CallInfo.from_call(lambda: None, "call"))
    next(hook)

    with pytest.raises(StopIteration):
        hook.send(report)

    assert report.outcome == outcome
