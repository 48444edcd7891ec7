"""`gradfn report STORE --serve`: what it answers, to whom, and what it refuses."""

import http.client
import threading
from urllib.parse import quote, urlsplit

import pytest
from pages import tree

from gradfn.cli.request import make
from gradfn.cli.results import ReportRequest
from gradfn.cli.serve import Server, opened_questions


@pytest.fixture(scope="module")
def server(store):
    request = make(ReportRequest, {"runs": [str(store)], "serve": True, "unit_normalize": True, "top": 3})
    server = Server(opened_questions(request))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def get(server):
    """Asks the server; gives status, headers and text."""

    def ask(path, method="GET", **headers):
        connection = http.client.HTTPConnection("127.0.0.1", server.server_port)
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        return answer.status, answer.headers, text

    return ask


def home(server):
    return urlsplit(server.url).path


def test_a_query_is_answered_as_gradfn_query_does(ok, server, get, store, tmp_path):
    status, headers, text = get(home(server))
    assert (status, headers["Referrer-Policy"]) == (200, "no-referrer")
    assert "form-action &#39;self&#39;" in text
    assert [one.attributes["name"] for one in tree(text).of_class("ask")[0].all("input")] == [
        "text",
        "completion",
    ]
    for prompt, completion in (("The capital of Peru is", "Lima"), ("The capital of Cuba is", "Havana")):
        status, _, text = get(f"{home(server)}?text={quote(prompt)}&completion={completion}")
        assert status == 200
        ok(
            "query",
            store,
            "--query",
            prompt,
            "--completion",
            f" {completion}",
            "--unit-normalize",
            "--csv",
            tmp_path / f"{completion}.csv",
        )
        lines = (tmp_path / f"{completion}.csv").read_text().splitlines()[1:]
        (first, *_) = (one for one in tree(text).all("section") if one.attributes.get("class") == "query")
        assert f"{prompt} → {completion}" in " ".join(first.content.split())
        assert "The model" in first.of_class("answer")[0].content
        cards = [
            one.attributes["data-row"] for one in first.all("li") if one.attributes.get("class") == "row"
        ]
        assert cards == [line.split(",")[4] for line in lines]
    assert "The capital of Peru is" in text
    assert get(home(server))[2] == text


def test_others_are_refused(server, get):
    own, port = home(server), server.server_port
    for path, headers, status in (
        ("/", {}, 404),
        ("/wrong/", {}, 404),
        (own + "store.h5", {}, 404),
        (own + "../store.h5", {}, 404),
        (own + "%2e%2e/store.h5", {}, 404),
        ("/%ff%00/", {}, 404),
        (own, {"Host": "evil.example"}, 403),
        (own, {"Host": f"evil.example:{port}"}, 403),
        (own, {"Origin": "http://evil.example"}, 403),
        (own, {"Origin": "null"}, 403),
        (own, {"Host": f"localhost:{port}", "Origin": f"http://localhost:{port}"}, 200),
    ):
        found = get(path, **headers)
        assert found[0] == status, (path, headers)
        assert (server.token in found[2]) is False
    assert get(own, "POST")[0] == 501
    assert server.server_address[0] == "127.0.0.1"


def test_a_query_that_cannot_be_asked_is_told_why(server, get):
    status, _, text = get(home(server) + "?text=" + quote("<b>" * 500))
    assert status == 400
    assert "in --query:" in tree(text).of_class("note")[0].content
    assert not [*tree(text).all("b")]


def test_what_cannot_be_served_is_refused_in_a_sentence(command, store, folder, model, corpus, queries):
    command("score", folder / "scores", "--model", model, "--dataset", corpus, "--query", queries)
    for given, words in (
        ((store, store), "--serve asks one store"),
        ((folder / "scores",), "has no store.h5"),
        ((store, "-o", "page.html"), "--output is of a page in a file"),
        ((store, "--port", 70000), "--port 70000 cannot be used"),
    ):
        result = command("report", *given, "--serve")
        assert (result.status, result.err.count("\n"), result.out) == (2, 1, ""), result.err
        assert words in result.err
    result = command("report", folder / "scores", "-o", folder / "p.html", "--port", 1)
    assert (result.status, result.err) == (2, "gradfn: --port is of --serve: leave it out\n")
