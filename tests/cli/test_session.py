"""`gradfn query STORE` at a terminal asks for queries, one after the other."""

import io
import os
import pty
import subprocess
import sys
import textwrap

import pytest

ASK = "The capital of Peru is"


class Terminal(io.StringIO):
    """What somebody types."""

    def isatty(self):
        return True


@pytest.fixture
def typed(command, monkeypatch):
    """`typed(lines, options)` gives what a session prints."""

    def run(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))
        return command("query", *arguments)

    return run


def after_the_introduction(out):
    return out.split("Ctrl-D ends\n", 1)[1]


def test_texts_are_answered_until_the_end(typed, ok, store):
    result = typed([f"{ASK} => Lima", "", "Nairobi is in Kenya"], store)
    assert (result.status, result.err) == (0, "")
    first, second = (part for part in result.out.split("query> ")[1:] if "proponent" in part)
    alone = ok("query", store, "--query", ASK, "--completion", " Lima")
    assert first.strip() == alone.split("\n\n", 1)[1].strip()
    assert second.strip() == ok("query", store, "--query", "Nairobi is in Kenya").split("\n\n", 1)[1].strip()
    assert result.out.count("query> ") == 4


def test_a_text_that_is_refused_ends_nothing(typed, store):
    result = typed(["x" * 5000, f"{ASK} => Lima"], store)
    assert result.status == 0
    assert result.err.count("gradfn: in --query: ") == 1
    assert "proponent 1" in result.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--csv", "t.csv"), "--csv goes with a query, and a session asks for queries"),
        (("--completion", "x"), "--completion goes with a query"),
    ],
)
def test_what_goes_with_one_query_is_refused(typed, store, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = typed([ASK], store, *options)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert words in result.err


def test_without_a_terminal_it_is_refused(command, store, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(ASK))
    result = command("query", store)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert "give one of --query" in result.err


def test_arrow_keys_bring_back_what_was_typed():
    code = """
        from gradfn.cli.session import converse
        converse(lambda text, completion: print("got", repr(text), repr(completion), flush=True))
    """
    terminal, theirs = pty.openpty()
    command = [sys.executable, "-c", textwrap.dedent(code)]
    child = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)

    def until(words):
        printed = b""
        while not printed.endswith(words):
            printed += os.read(terminal, 1)

    up, left = b"\x1b[A", b"\x1b[D"
    for keys, answer in (
        (b"one => two\r", b"got 'one' ' two'"),
        (b"other\r", b"got 'other' None"),
        (up + up + left + b"T\r", b"got 'one' ' twTo'"),
    ):
        until(b"query> ")
        os.write(terminal, keys)
        until(answer)
    until(b"query> ")
    os.write(terminal, b"\x04")
    assert child.wait(timeout=60) == 0
    os.close(terminal)
