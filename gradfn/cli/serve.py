"""`gradfn report STORE --serve`: a page on this machine, with a box to ask the store a query of one's own."""

import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

from gradfn.cli.commands import QueryRequest, spelled
from gradfn.cli.console import SPOKEN, console
from gradfn.cli.inputs import Loaded
from gradfn.cli.queries import answers_of, load_asked
from gradfn.cli.query import Search, opened_search
from gradfn.cli.request import make
from gradfn.cli.results import ReportRequest
from gradfn.errors import InputError
from gradfn.hf.answers import Answer
from gradfn.report.page import Beside, PageRun, empty_page, page_html
from gradfn.report.rankings import ShownQueries
from gradfn.report.tables import facts
from gradfn.report.words import clean
from gradfn.runs.exchange import IMPORTED
from gradfn.runs.gradients import open_gradients
from gradfn.scores import Scores

HOST = "127.0.0.1"
REMEMBERED = 20
"""Queries that a page holds, the last one first."""
HEADERS = {
    "Content-Type": "text/html; charset=utf-8", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff", "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip


@dataclass(eq=False)
class Questions:
    """A store, and what it was asked, the last query first.

    Args:
        search: the store with its model.
        loaded: the model.
        top: rows that each side of a query lists.
    """

    search: Search
    loaded: Loaded
    top: int
    texts: list[str] = field(default_factory=list)
    columns: list[torch.Tensor] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)

    def ask(self, text: str, completion: str | None) -> str:
        """The page of a query and those before it.

        Raises:
            InputError: the query has nothing to predict, or is too long.
        """
        query = replace(self.search.request.query, query=text, completion=completion)
        asked = load_asked(self.loaded, None, query, self.search.request.data)
        assert asked is not None
        documents, column = asked.documents, self.search.scores(asked)
        known = answers_of(self.loaded, ShownQueries(documents.ids, documents.texts, documents=documents))
        self.columns.insert(0, column)  # only what was answered whole is remembered
        self.texts.insert(0, documents.texts[0])
        self.answers[:0] = known or []
        for kept in (self.columns, self.texts, self.answers):
            del kept[REMEMBERED:]
        return self.page()

    def page(self) -> str:
        """All that was asked."""
        if not self.texts:
            return self.empty()
        store = self.search.store
        ids = [str(number) for number in range(len(self.texts), 0, -1)]
        scores = Scores(
            torch.cat(self.columns, 1)[None], store.read("rows/id").tolist(), ids, query_texts=self.texts,
            settings=store.settings, name=clean(store.path.parent.name),
        )  # fmt: skip
        command = spelled(store.request) if store.request else ""
        run = PageRun(scores, store, Beside(self.answers), command=command)
        return page_html([run], top=self.top, asking=True)

    def empty(self, notes: Sequence[str] = ()) -> str:
        """The page before any query, or of one that is refused."""
        return empty_page(clean(self.search.store.path.parent.name), self.search.store.rows, notes)


class Server(ThreadingHTTPServer):
    """Answers this machine alone, under an address with a random token.

    Args:
        questions: what is asked.
        port: 0 is a free one.
    """

    def __init__(self, questions: Questions, port: int = 0):
        try:
            super().__init__((HOST, port), Handler)
        except (OSError, OverflowError) as error:
            raise InputError(
                f"--port {port} cannot be used ({error}): give another, or leave it out"
            ) from error
        self.questions, self.token, self.lock = questions, secrets.token_urlsafe(24), Lock()
        self.origins = {f"http://{host}:{self.server_port}" for host in (HOST, "localhost")}

    @property
    def url(self) -> str:
        """The address to open."""
        return f"http://{HOST}:{self.server_port}/{self.token}/"


class Handler(BaseHTTPRequestHandler):
    """One request: the page, or a refusal; there are no files."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version, timeout = "gradfn", "", 20

    def do_GET(self) -> None:
        """Answer a query, or show the empty page."""
        address, origin = urlsplit(self.path), self.headers.get("Origin")
        hosts = self.headers.get_all("Host") or []
        foreign = len(hosts) != 1 or f"http://{hosts[0]}" not in self.server.origins
        if foreign or (origin is not None and origin not in self.server.origins):
            return self._reply(HTTPStatus.FORBIDDEN, "This page is for the browser of this machine.")
        token, _, rest = address.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()) or rest:
            return self._reply(HTTPStatus.NOT_FOUND, "There is nothing here.")
        asked = {name: values[0] for name, values in parse_qs(address.query).items()}
        questions, completion = self.server.questions, asked.get("completion", "").strip()
        SPOKEN.set("nowhere")  # in this thread
        try:
            with self.server.lock:
                if asked.get("text", "").strip():
                    page = questions.ask(asked["text"], f" {completion}" if completion else None)
                else:
                    page = questions.page()
        except InputError as error:
            return self._reply(HTTPStatus.BAD_REQUEST, questions.empty([f"{error}."]))
        self._reply(HTTPStatus.OK, page)

    def _reply(self, status: HTTPStatus, html: str) -> None:
        body = html.encode()
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests, whose addresses have the token in them."""


def opened_questions(request: ReportRequest) -> Questions:
    """The store that is to be asked, with its model.

    Raises:
        InputError: there are several runs, or an option of a page in a file; no store, or one that cannot be
            asked a text.
    """
    if request.runs[1:]:
        raise InputError("--serve asks one store: give one run that gradfn build wrote")
    if given := request.gave("output", "truth", "no_model", "overwrite"):
        raise InputError(f"{given} is of a page in a file, and --serve writes none: leave it out")
    run = request.runs[0]
    with open_gradients(run) as store:
        if IMPORTED in store.settings:
            raise InputError(f"{run} was imported, without a model that could be asked a text")
        if store.settings["layers"]["tokens"]:
            raise InputError(f"{run} holds gradients by token: serve a store of rows, of gradfn build")
        given = {"store": run, "device": request.device}
        asks = make(QueryRequest, {**given, "unit_normalize": True} if request.unit_normalize else given)
        search = opened_search(store, asks)
    assert search.loaded is not None
    if search.loaded.reads.processor is not None:
        raise InputError("images cannot be typed: ask with gradfn query, and a folder of them as --query")
    return Questions(search, search.loaded, request.top)


def serve(request: ReportRequest) -> None:
    """Answer a browser until Ctrl-C."""
    server = Server(opened_questions(request), request.port)
    console().print(facts([("page", server.url), ("stop", "Ctrl-C")]))
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        return
    finally:
        server.server_close()
