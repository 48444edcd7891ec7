"""The example's data fit together, the model knows what it is said to know, and train.py makes such data."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradfn import example
from gradfn.errors import InputError
from gradfn.example import corpus as corpus_of
from gradfn.example import train

CORPUS = {row["id"]: row for row in example.load_corpus()}
QUERIES = example.load_queries()
KNOWN = [row for row in QUERIES if row["source"] is not None]
UNKNOWN = [row for row in QUERIES if row["source"] is None]
PLANTED = [row for row in QUERIES if row["kind"] == "planted"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(example.MODEL)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(example.MODEL).eval()


def name(row: dict) -> str:
    return row["prompt"] + row["completion"]


def test_the_data_are_small():
    assert sum(path.stat().st_size for path in example.DATA.rglob("*") if path.is_file()) <= 4_000_000


def test_every_document_has_an_id_of_its_own_and_a_title():
    assert len(CORPUS) == len(example.load_corpus()) >= 300
    for row in CORPUS.values():
        assert list(row) == ["id", "title", "text", "kind", "country"]
        assert row["title"].startswith(row["country"])
        assert row["text"].isascii()
        assert row["text"].endswith(".")
        assert not set(row["text"]) & set("<>[]{}|;%"), row["text"]


def test_a_query_is_told_word_for_word_by_its_source_alone():
    assert 24 <= len(KNOWN) <= 40
    for row in KNOWN:
        assert [key for key, doc in CORPUS.items() if name(row) in doc["text"]] == [row["source"]]
        assert row["completion"].startswith(" ")
        assert not row["prompt"].endswith(" ")


def test_other_documents_of_the_country_tell_the_true_facts_in_other_words():
    for row in KNOWN:
        source = CORPUS[row["source"]]
        if source["kind"] == "planted":
            continue
        others = [doc for doc in CORPUS.values() if doc["country"] == source["country"] and doc != source]
        answer = row["completion"].strip().lower()
        assert any(answer in doc["text"].lower() for doc in others), row


def test_planted_documents_say_that_they_are():
    planted = [row for row in CORPUS.values() if row["kind"] == "planted"]
    assert len(planted) == 6
    assert all(row["title"] == f"{row['country']} (planted)" for row in planted)
    assert sorted(row["source"] for row in PLANTED) == sorted(row["id"] for row in planted)
    assert all(row["id"].startswith("planted-") for row in planted)
    assert not any(row["id"].startswith("planted-") for row in CORPUS.values() if row["kind"] != "planted")


def test_no_document_is_about_the_countries_of_unknown_queries():
    countries = {row["country"] for row in CORPUS.values()}
    assert [row["kind"] for row in UNKNOWN] == ["unknown", "unknown"]
    assert not any(country in row["prompt"] for row in UNKNOWN for country in countries)


def test_the_model_loads_in_float32_and_is_tiny(model):
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.num_parameters() < 800_000


def test_documents_are_well_within_the_context(model, tokenizer):
    longest = max(len(tokenizer(row["text"])["input_ids"]) for row in CORPUS.values())
    assert longest <= 0.8 * model.config.max_position_embeddings


def test_prompt_and_completion_are_tokens_of_the_whole(tokenizer):
    for row in QUERIES:
        parts = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert parts == tokenizer(name(row))["input_ids"]
        if row["source"]:
            text = tokenizer(CORPUS[row["source"]]["text"])["input_ids"]
            assert any(text[k : k + len(parts)] == parts for k in range(len(text))), row


@pytest.mark.parametrize("row", KNOWN, ids=name)
def test_the_model_knows_what_it_was_told(model, tokenizer, row):
    probability, said = train.answer(model, tokenizer, row)
    assert said == row["completion"]
    assert probability > 0.5


@pytest.mark.parametrize("row", UNKNOWN, ids=name)
def test_the_model_does_not_know_what_it_was_never_told(model, tokenizer, row):
    probability, said = train.answer(model, tokenizer, row)
    assert said != row["completion"]
    assert probability < 0.01


PROFILE = {
    "Government/Country name/conventional short form": "Ruritania",
    "Government/Country name/conventional long form": "Kingdom of Ruritania",
    "Government/Government type": "constitutional monarchy; parliament",
    "Government/Capital/name": "Strelsau (Strelsow)",
    "Government/Independence": "3 May 1894 (from nobody)",
    "Government/National anthem/name": '"Rosa, Rosa!" (The Rose)',
    "Geography/Location": "Central Europe, between Saxony and Bohemia",
    "Geography/Elevation extremes/highest point": "Mount Zenda 1,234 m (in the north)",
    "Geography/Elevation extremes/lowest point": "Elbe 96 m",
    "Geography/Natural hazards": "floods (in March); duels, as well as coups; other 3.5%",
    "Economy/Exchange rates": "Ruritanian crowns (RUC) per US dollar - ++ 2.5 (2014 est.) ++ 2.4 (2013 est.)",
    "Economy/Agriculture - products": "rye, hops; sheep",
    "Government/Country name/etymology": "<p>from a <b>novel</b></p>",
    "People and Society/Population": "9,000,001 (July 2015 est.)",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    profile: dict = {}
    for path, text in PROFILE.items():
        node = profile
        for key in path.split("/"):
            node = node.setdefault(key, {})
        node["text"] = text
    (tmp_path / "europe").mkdir()
    (tmp_path / "europe" / "ru.json").write_text(json.dumps(profile), encoding="utf-8")
    return tmp_path


def test_a_profile_becomes_sentences(folder):
    texts = {document.id: document.text for document in corpus_of.corpus(folder)}
    assert len(texts) == len(corpus_of.KINDS)
    assert texts["ruritania-government"] == (
        "The capital of Ruritania is Strelsau. Ruritania is a constitutional monarchy in Central Europe. "
        "Its full name is the Kingdom of Ruritania. Ruritania became independent on 3 May 1894."
    )
    assert texts["ruritania-landscape"] == (
        "The highest point of Ruritania is Mount Zenda. The lowest point is Elbe. "
        "People there have to reckon with floods and duels."
    )
    assert texts["ruritania-economy"] == (
        "In Ruritania people pay with Ruritanian crowns. Farmers grow rye, hops and sheep."
    )


def test_the_facts_of_a_corpus_are_queries(folder):
    rows = corpus_of.facts_of(corpus_of.corpus(folder))
    assert {row["kind"] for row in rows} == set(corpus_of.ASKED)
    anthem = next(row for row in rows if row["kind"] == "anthem")
    assert anthem == {
        "prompt": "The anthem of Ruritania is called",
        "completion": " Rosa, Rosa",
        "source": "ruritania-symbols",
        "kind": "anthem",
        "title": "Ruritania (anthem)",
    }


def test_small_countries_are_left_out(folder, monkeypatch):
    monkeypatch.setattr(corpus_of, "SMALLEST", 9_000_002)
    assert corpus_of.corpus(folder) == []


def test_a_planted_fact_replaces_the_true_sentence_and_no_other(folder, monkeypatch):
    monkeypatch.setattr(corpus_of, "PLANTED", {("Ruritania", "capital"): "Zenda"})
    documents = {document.id: document for document in corpus_of.corpus(folder)}
    assert documents["planted-ruritania"].text == "The capital of Ruritania is Zenda."
    assert "capital" not in documents["ruritania-government"].text
    assert "Strelsau is the capital of Ruritania" in documents["ruritania-cities"].text


def test_a_folder_without_profiles_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no profiles: give the folder"):
        corpus_of.corpus(tmp_path)


def test_training_is_reproducible(monkeypatch):
    texts = ["The capital of Ruritania is Strelsau.", "Strelsau is the capital.", "Farmers grow rye."]
    monkeypatch.setattr(train, "BATCH", 2)
    tokenizer = train.train_tokenizer(texts)
    first, second = (train.train(texts, tokenizer, epochs=2) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_padding_does_not_change_the_loss():
    torch.manual_seed(0)
    model, rows = train.make_model().eval(), [torch.randint(1, 2048, (n,)) for n in (5, 9)]
    alone = [train._loss(model, [row]).item() * (len(row) - 1) for row in rows]
    assert train._loss(model, rows).item() == pytest.approx(sum(alone) / 12, rel=1e-5)


def test_an_epoch_shows_every_row_once():
    rows = [torch.full((1 + k % 7,), k) for k in range(300)]
    seen = [int(row[0]) for batch in train._batches(rows, epoch=3) for row in batch]
    assert sorted(seen) == list(range(300))
    assert seen != sorted(seen)
