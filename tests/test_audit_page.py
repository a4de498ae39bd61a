"""The auditor's page: in a real browser and against hostile uploads (THREATS T26)."""

from __future__ import annotations

import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import uvicorn

from cloister.auditpage import audit_app
from cloister.graph import drawing
from provenance.bundle import Bundle, save_bundle
from provenance.lineage import Edge, Graph, Vertex
from provenance.records import DATASET_DIGEST, DatasetRecord
from tests.bundles import Owner, digest_of, revocation, small

SCRIPT = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">'\"&"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bundles of a good run, a revoked one over three owners, and one with script in every string."""
    at = tmp_path_factory.mktemp("served")
    owner, run, _ = small(at)
    (at / "bundles").mkdir()
    save_bundle(owner.bundle(run), at / "bundles" / "good.zip")
    first, second, third = (Owner(at, number) for number in (0x21, 0x22, 0x23))
    first.dataset("heart scans of Linden ward")
    begun = first.bundle(first.run("01" * 32, ["heart scans of Linden ward"], name="begin"))
    second.dataset("two")
    on: Bundle = second.bundle(second.run("02" * 32, ["two"], name="go on", initial="01" * 32), begun)
    third.dataset("three")
    finish = third.run("03" * 32, ["three"], name="finish", initial="02" * 32)
    gone = first.bundle(revocation(first, "dataset", {DATASET_DIGEST: digest_of("heart scans of Linden ward")}))
    save_bundle(third.bundle(finish, on), at / "bundles" / "lineage.zip")
    save_bundle(gone, at / "revocation.zip")
    evil = Owner(at, 0x66)
    evil.put(
        {DATASET_DIGEST: digest_of(SCRIPT)},
        DatasetRecord(kind="files", records=1, order="name", description=SCRIPT),
        SCRIPT,
    )
    save_bundle(evil.bundle(evil.run("06" * 32, [SCRIPT], name=SCRIPT)), at / "bundles" / "evil.zip")
    (at / "bundles" / "none.zip").write_bytes(b"no bundle")
    return at


@pytest.fixture(scope="module")
def page(folder: Path) -> Iterator[str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    config = uvicorn.Config(audit_app(folder / "bundles"), host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    give_up = time.monotonic() + 60
    while not server.started and time.monotonic() < give_up:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(30)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


def sent(page: str, *bundles: Path, model: Path | None = None, follow: bool = True) -> requests.Response:
    files = [("bundle", (path.name, path.read_bytes())) for path in bundles]
    files += [("model", (model.name, model.read_bytes()))] if model else []
    return requests.post(f"{page}/verify", files=files, timeout=60, allow_redirects=follow)


def test_a_bundle_and_its_model_are_verified_and_the_report_is_downloaded(page: str, folder: Path) -> None:
    answer = sent(page, folder / "bundles" / "good.zip", model=folder / "model.safetensors")

    assert answer.status_code == 200
    assert "is the model" in answer.text
    told = requests.get(f"{answer.url}.json", timeout=30)
    assert told.headers["content-disposition"].startswith("attachment")
    assert {"verdict", "claims", "graph", "subject"} <= set(told.json())


def test_a_model_file_alone_finds_its_bundle_and_so_does_a_digest(page: str, folder: Path) -> None:
    assert "good.zip" in sent(page, model=folder / "model.safetensors").text
    assert "lineage.zip" in requests.get(f"{page}/find?digest={'01' * 32}", timeout=30).text
    assert "No bundle" in requests.get(f"{page}/find?digest={'99' * 32}", timeout=30).text
    assert requests.get(f"{page}/find?digest=zz", timeout=30).status_code == 422


def test_T26_every_answer_forbids_scripts_and_foreign_parts(page: str, folder: Path) -> None:
    answers = [requests.get(f"{page}{path}", timeout=30) for path in ("/", "/style.css", "/report/none", "/nowhere")]
    answers += [sent(page, folder / "bundles" / "evil.zip"), sent(page, folder / "bundles" / "none.zip")]

    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "<script" not in answer.text.lower()
    assert [answer.status_code for answer in answers] == [200, 200, 404, 404, 200, 422]


def test_T26_script_in_every_string_is_shown_as_text(page: str, folder: Path) -> None:
    text = sent(page, folder / "bundles" / "evil.zip").text

    assert SCRIPT not in text
    assert "&lt;script&gt;" in text
    assert "<img" not in text


def test_T26_what_is_no_bundle_is_refused_and_too_much_is_not_read(page: str, folder: Path) -> None:
    assert "no zip archive" in sent(page, folder / "bundles" / "none.zip").text
    assert sent(page, *[folder / "bundles" / "good.zip"] * 9).status_code == 422
    assert requests.post(f"{page}/verify", timeout=30).status_code == 422
    large = {"Content-Length": str(2**40), "Content-Type": "multipart/form-data; boundary=x"}
    with socket.create_connection(("127.0.0.1", int(page.rsplit(":", 1)[1])), timeout=30) as raw:
        head = "".join(f"{name}: {value}\r\n" for name, value in ({"Host": "localhost"} | large).items())
        raw.sendall(f"POST /verify HTTP/1.1\r\n{head}\r\n".encode())
        assert b" 413 " in raw.recv(200)
    chunked = requests.post(f"{page}/verify", data=iter([b"x"]), timeout=30)
    assert chunked.status_code == 413


def test_T26_another_sites_name_is_not_answered(page: str) -> None:
    answer = requests.get(f"{page}/", headers={"Host": "evil.example"}, timeout=30)

    assert answer.status_code == 400


def test_a_report_is_forgotten_after_some_others(page: str, folder: Path) -> None:
    first = sent(page, folder / "revocation.zip").url
    for _ in range(32):
        sent(page, folder / "revocation.zip", follow=False)

    assert requests.get(first, timeout=30).status_code == 404


@pytest.mark.parametrize(("javascript", "width"), [(True, 1280), (False, 1280), (True, 390), (False, 390)])
def test_in_a_browser_a_revoked_lineage_is_read_with_and_without_javascript(  # noqa: PLR0917 - fixtures
    browser: Any,
    page: str,
    folder: Path,
    javascript: bool,  # noqa: FBT001 - pytest passes it
    width: int,
    tmp_path: Path,
) -> None:
    context = browser.new_context(java_script_enabled=javascript, viewport={"width": width, "height": 900})
    foreign: list[str] = []
    tab = context.new_page()
    tab.on("request", lambda request: None if request.url.startswith(page) else foreign.append(request.url))
    tab.goto(page)
    _shoot(tab, tmp_path, f"front-{width}")
    tab.set_input_files("#bundle", [folder / "bundles" / "lineage.zip", folder / "revocation.zip"])
    tab.get_by_role("button", name="Verify").click()

    assert "revoked" in tab.locator(".banner").inner_text().lower()
    assert "consent was withdrawn" in tab.content()
    assert tab.locator("svg g").count() == 9
    assert tab.evaluate("document.documentElement.scrollWidth") <= width if javascript else True
    _shoot(tab, tmp_path, f"lineage-{width}")
    assert not foreign
    context.close()


def test_T26_in_a_browser_script_in_every_string_stays_text(browser: Any, page: str, tmp_path: Path) -> None:
    tab = browser.new_page()
    said: list[str] = []
    tab.on("console", lambda message: said.append(message.text))
    tab.goto(f"{page}/verify/evil.zip")

    assert tab.title() != "owned"
    assert tab.locator("script, img").count() == 0
    assert said == []
    _shoot(tab, tmp_path, "evil")
    tab.close()


@pytest.mark.parametrize(
    "path", ["/", "/verify/lineage.zip", "/verify/evil.zip", "/find?digest=010101010101", "/nowhere"]
)
def test_axe_finds_nothing_against_wcag_aa(browser: Any, page: str, path: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    context = browser.new_context(bypass_csp=True)  # axe is a script that the page itself would not let run
    tab = context.new_page()
    tab.goto(page + path)

    tags = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]}
    found = axe.Axe().run(tab, options=tags)

    assert found.response["violations"] == [], found.generate_report()
    context.close()


def test_a_graph_with_a_circle_is_drawn_and_a_large_one_is_a_table() -> None:
    pair = tuple(Vertex(id=f"run:{number}", kind="run", name="x" * 99, by=()) for number in range(2))
    circle = (Edge(source="run:0", target="run:1"), Edge(source="run:1", target="run:0"))

    assert drawing(Graph(vertices=pair, edges=circle)) is not None
    many = tuple(Vertex(id=f"run:{number}", kind="run", name="x", by=()) for number in range(61))
    assert drawing(Graph(vertices=many, edges=())) is None


def _shoot(tab: Any, folder: Path, name: str) -> None:
    """A picture of the page, where ``CLOISTER_SCREENSHOTS`` names a folder; else among the test's own files."""
    tab.screenshot(path=Path(os.environ.get("CLOISTER_SCREENSHOTS", folder)) / f"{name}.png", full_page=True)
