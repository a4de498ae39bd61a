"""The auditor's page: drop a bundle, read what is proven and what is only stated (T26).

Plain HTML from templates that escape whatever they show, no script at all, nothing from elsewhere, and a content
security policy that forbids both. What is uploaded is bounded before it is read, never unpacked to disk, and forgotten:
the page keeps the last few reports in memory, and no secrets.
"""

from __future__ import annotations

import dataclasses
import secrets
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, File, Query, Request, UploadFile
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.templating import Jinja2Templates
from jinja2 import Environment, PackageLoader, select_autoescape
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cloister import __version__
from cloister.graph import drawing
from provenance.bundle import MAX_BUNDLE_BYTES, Bundle, load_bundle, parse_bundle
from provenance.claims import SHORT
from provenance.evidence import Witness, gather
from provenance.models import digest_model
from provenance.verification import Report, verify
from wire.errors import CloisterError, ConfigError, ProvenanceError

__all__ = ["MAX_UPLOAD_BYTES", "audit_app"]

MAX_UPLOAD_BYTES: Final = 4 * 2**30  # a model of a billion parameters in fp32
_KEPT: Final = 32  # reports in memory
_MOST_BUNDLES: Final = 8  # of one upload: each may have 64 MiB
_HEADERS: Final = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_WORDS: Final = {
    "holds": "Nothing here fails, and nothing is left open.",
    "unknown": "Nothing fails; some claims are not decided by what was given.",
    "revoked": "Something that this builds on was revoked.",
    "fails": "Something fails: do not rely on this.",
}


@dataclasses.dataclass(frozen=True, slots=True)
class _Kept:
    report: Report
    name: str
    at: str


class _Page:
    """What the page knows: the bundles of its folder, and the last few reports."""

    def __init__(self, folder: Path | None, witness: Witness | None, confirmations: int) -> None:
        self.bundles = _bundles_of(folder)
        self._witness, self._confirmations = witness, confirmations
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._one = threading.Lock()  # verification takes a core: one at a time

    def verify(self, name: str, bundles: Sequence[Bundle], model: Path | None) -> str:
        """Verifies, and keeps the report under the number that it returns."""
        with self._one:
            first, *others = bundles
            report = verify(first, others, model=model, witness=self._witness, confirmations=self._confirmations)
            number = secrets.token_hex(8)
            self._kept[number] = _Kept(report, name, datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"))
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return number

    def report(self, number: str) -> _Kept:
        """One of the last few.

        Raises:
            HTTPException: it is forgotten.
        """
        kept = self._kept.get(number)
        if kept is None:
            raise HTTPException(404, "This report is no longer kept: drop the bundle again.")
        return kept

    def holding(self, digest: str) -> list[str]:
        """The names of the folder's bundles that hold a record with this digest, or about it."""
        found = []
        for name, (_, mentions) in self.bundles.items():
            if any(each.startswith(digest) for each in mentions):
                found.append(name)
        return found


def audit_app(  # noqa: C901 - one short function a route
    folder: Path | None = None,
    *,
    witness: Witness | None = None,
    confirmations: int = 12,
    hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]"),
) -> FastAPI:
    """The page as an ASGI application.

    Args:
        folder: whose bundles can be looked up.
        witness: the chain that anchors are looked for on.
        confirmations: blocks on top before an anchor is final.
        hosts: names that the page answers to: another site cannot point its own name here.
    """
    page = _Page(folder, witness, confirmations)
    environment = Environment(loader=PackageLoader("cloister"), autoescape=select_autoescape(default=True))
    templates = Jinja2Templates(env=environment)
    app = FastAPI(title="Cloister audit", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*hosts, *(host.strip("[]") for host in hosts)])
    app.add_middleware(_Guard)

    def shown(request: Request, file: str, status: int = 200, **values: Any) -> HTMLResponse:  # noqa: ANN401
        return templates.TemplateResponse(request, file, {"version": __version__, **values}, status_code=status)

    @app.exception_handler(HTTPException)
    def refused(request: Request, error: HTTPException) -> HTMLResponse:
        return shown(request, "refused.html", error.status_code, message=str(error.detail))

    @app.exception_handler(CloisterError)
    def failed(request: Request, error: CloisterError) -> HTMLResponse:
        return shown(request, "refused.html", 422, message=str(error))

    @app.get("/")
    def front(request: Request) -> HTMLResponse:
        return shown(request, "front.html", bundles=list(page.bundles))

    @app.get("/style.css")
    def style() -> Response:
        source, *_ = environment.loader.get_source(environment, "style.css")  # type: ignore[union-attr]
        return Response(source, media_type="text/css")

    @app.post("/verify")
    def upload(
        bundle: Annotated[list[UploadFile], File()] = [],  # noqa: B006 - FastAPI's own way to say "may be missing"
        model: Annotated[UploadFile | None, File()] = None,
    ) -> Response:
        given = [each for each in bundle if each.filename]
        if len(given) > _MOST_BUNDLES:
            raise ConfigError(f"at most {_MOST_BUNDLES} bundles at once")
        weights = model if model is not None and model.filename else None
        bundles = [parse_bundle(each.file.read(MAX_BUNDLE_BYTES + 1)) for each in given]
        with tempfile.TemporaryDirectory(prefix="cloister-audit-") as at:
            path = None if weights is None else _saved(weights, Path(at))
            if bundles:
                number = page.verify(given[0].filename or "bundle", bundles, path)
                return RedirectResponse(f"/report/{number}", 303)
            if path is None:
                raise ConfigError("choose a bundle, or a model file")
            return RedirectResponse(f"/find?digest={digest_model(path).root.hex()}", 303)

    @app.get("/verify/{name}")
    def known(name: str) -> Response:
        if name not in page.bundles:
            raise HTTPException(404, "There is no such bundle in the folder that is served.")
        return RedirectResponse(f"/report/{page.verify(name, [page.bundles[name][0]], None)}", 303)

    @app.get("/find")
    def find(request: Request, digest: Annotated[str, Query(max_length=200)]) -> HTMLResponse:
        wanted = digest.strip().lower().removeprefix("sha256:").removeprefix("0x")
        if len(wanted) < SHORT or set(wanted) - set("0123456789abcdef"):
            raise ConfigError(f"a digest has at least {SHORT} digits, 0 to 9 and a to f")
        return shown(request, "found.html", digest=wanted, bundles=page.holding(wanted))

    @app.get("/report/{number}.json")
    def as_json(number: str) -> JSONResponse:
        kept = page.report(number)
        content = dataclasses.asdict(kept.report) | {
            "bundle": kept.name,
            "verifiedAt": kept.at,
            "cloister": __version__,
        }
        return JSONResponse(content, headers={"Content-Disposition": 'attachment; filename="report.json"'})

    @app.get("/report/{number}")
    def report(request: Request, number: str) -> HTMLResponse:
        kept = page.report(number)
        values: dict[str, Any] = {"report": kept.report, "name": kept.name, "at": kept.at, "number": number}
        words = _WORDS[kept.report.verdict]
        return shown(request, "report.html", words=words, drawing=drawing(kept.report.graph), **values)

    return app


def _saved(upload: UploadFile, folder: Path) -> Path:
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        shutil.copyfileobj(upload.file, file)
    return path


def _bundles_of(folder: Path | None) -> Mapping[str, tuple[Bundle, frozenset[str]]]:
    """A folder's bundles by their file's name, and the digests that each is about; what is no bundle is left out."""
    found: dict[str, tuple[Bundle, frozenset[str]]] = {}
    for path in sorted(folder.glob("*.zip")) if folder is not None else []:
        try:
            bundle = load_bundle(path)
        except ProvenanceError:
            continue
        about = gather([bundle]).about
        found[path.name] = (bundle, frozenset(bundle.records) | frozenset(about))
    return found


class _Guard:
    """Every answer has the headers; no request has more bytes than may be uploaded."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        left = MAX_UPLOAD_BYTES

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, "More was sent than may be uploaded.")
            return message

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((name.lower().encode(), value.encode()) for name, value in _HEADERS.items()),
                ]
            await send(message)

        # Without a length the body comes in chunks, which only programs send: a form always has one.
        chunked = scope["method"] == "POST" and b"content-length" not in headers
        if chunked or not length.isdigit() or int(length) > MAX_UPLOAD_BYTES:
            answer = Response("More than may be uploaded.", 413, media_type="text/plain")
            await answer(scope, receive, guarded)
            return
        await self._app(scope, bounded, guarded)
