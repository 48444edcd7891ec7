"""From values to one HTML file. Text that comes from data is escaped, and its hidden letters are shown."""

import base64
import hashlib
import json
import unicodedata
from functools import cache
from importlib.resources import files
from typing import Any

SCRIPT_ESCAPES = str.maketrans({
    "<": r"\u003c", ">": r"\u003e", "&": r"\u0026", "\u2028": r"\u2028", "\u2029": r"\u2029"
})  # fmt: skip
JOINERS = "\u200c\u200d"
"""Letters of the category Cf that are part of words and emoji."""
MINUS = "\u2212"
UNSEEN = ("Cc", "Cf", "Cs", "Co", "Cn")
POLICY = (
    "default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; img-src data:; "
    "base-uri 'none'; form-action {forms}"
)


def visible(text: str) -> str:
    """A text in which letters that are not seen, or turn what is seen, are written out.

    >>> visible("a\\x1b[31m\\u202eb\\n")
    'a␛[31m⟨202E⟩b\\n'
    """
    if text.isprintable():
        return text
    return "".join(map(_visible, text.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n")))


def _visible(letter: str) -> str:
    if letter in "\n\t" or letter in JOINERS or unicodedata.category(letter) not in UNSEEN:
        return letter
    return chr(0x2400 + ord(letter)) if ord(letter) < 32 else f"⟨{ord(letter):04X}⟩"


def as_script(value: Any) -> str:
    """JSON that can stand in a script element: nothing in it ends the element, or begins a comment.

    >>> print(as_script({"text": "</script><!--"}))
    {"text":"\\u003c/script\\u003e\\u003c!--"}
    """
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).translate(
        SCRIPT_ESCAPES
    )


def signed(value: float) -> str:
    """A score with its sign, as tables have it.

    >>> signed(0.91123), signed(-2579.0)
    ('+0.9112', '\u22122579')
    """
    return f"{value:+.4g}".replace("-", MINUS)


@cache
def _file(name: str) -> str:
    return files("gradfn.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _environment() -> Any:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    made = Environment(
        loader=FunctionLoader(_file), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"visible": visible, "signed": signed, "script": as_script}
    return made


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(page: Any, *, forms: bool = False) -> str:
    """The HTML of a page.

    Args:
        page: what the template shows.
        forms: whether it may send a form to where it came from.
    """
    style, script = _file("page.css"), _file("page.js")
    policy = POLICY.format(
        style=_digest(style), script=_digest(script), forms="'self'" if forms else "'none'"
    )
    template = _environment().get_template("page.html.jinja")
    return template.render(page=page, style=style, script=script, policy=policy)
