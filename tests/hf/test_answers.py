import math

import pytest
import torch
from tiny import make_model, make_tokenizer

from gradfn.data import IGNORED, make_documents
from gradfn.hf import text_query
from gradfn.hf.answers import SAID_TOKENS, answers

PROMPT = "The capital of Peru is"


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def tokens():
    return make_tokenizer()


def greedy(model, ids, count):
    """What `generate` appends."""
    prompt = torch.tensor([ids])
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return out[0, len(ids) :].tolist()


def asked(tokens, prompt_ids, answer_ids):
    return make_documents([prompt_ids + answer_ids], [[IGNORED] * len(prompt_ids) + answer_ids])


def test_loss_and_probability_are_the_models(model, tokens):
    query = text_query(tokens, PROMPT, " Lima")
    (answer,) = answers(model, tokens, query)
    loss = model(query[0]["input_ids"][None], labels=query[0]["labels"][None]).loss.item()
    assert answer.loss == pytest.approx(loss, rel=1e-5)
    assert answer.probability == pytest.approx(math.exp(-loss * int(query.supervised[0])), rel=1e-4)


def test_a_known_answer_is_what_greedy_decoding_gives(model, tokens):
    prompt = tokens(PROMPT).input_ids
    (answer,) = answers(model, tokens, asked(tokens, prompt, greedy(model, prompt, 4)))
    assert (answer.known, answer.says) == (True, "")


def test_an_unknown_answer_is_shown_as_the_model_gives_it(model, tokens):
    prompt = tokens(PROMPT).input_ids
    said = greedy(model, prompt, 4)
    for wrong in range(4):
        other = [(token + (i == wrong)) % 300 for i, token in enumerate(said)]
        (answer,) = answers(model, tokens, asked(tokens, prompt, other))
        assert (answer.known, answer.says) == (False, tokens.decode(said))


def test_the_tokenizers_last_token_ends_what_the_model_says(model):
    tokens = make_tokenizer()
    prompt = tokens(PROMPT).input_ids
    said = greedy(model, prompt, 4)
    assert said[2] not in said[:2]
    tokens.eos_token = tokens.convert_ids_to_tokens(said[2])
    (answer,) = answers(model, tokens, asked(tokens, prompt, [1, 2, 3, 4]))
    assert answer.says == tokens.decode(said[:2])


def test_a_text_asks_nothing(model, tokens):
    (answer,) = answers(model, tokens, text_query(tokens, PROMPT + " Lima"))
    assert (answer.known, answer.says) == (None, "")
    assert answer.loss > 0


def test_of_a_long_answer_it_is_not_told_what_the_model_says(model, tokens):
    prompt = tokens(PROMPT).input_ids
    for length, said in ((SAID_TOKENS, tokens.decode(greedy(model, prompt, SAID_TOKENS))), (40, "")):
        (answer,) = answers(model, tokens, asked(tokens, prompt, [7] * length))
        assert (answer.known, answer.says) == (False, said)


@pytest.mark.parametrize(("completion", "glued"), [("Lima", True), (" Lima", False), (".", False)])
def test_a_completion_without_a_space_goes_on_with_the_last_word(model, tokens, completion, glued):
    (answer,) = answers(model, tokens, text_query(tokens, PROMPT, completion))
    assert (answer.known, answer.glued) == (False, glued)


def test_nothing_supervised(model, tokens):
    (answer,) = answers(model, tokens, make_documents([[1, 2, 3]], [[IGNORED] * 3]))
    assert math.isnan(answer.loss)
    assert (answer.probability, answer.known, answer.says) == (1.0, None, "")


def test_every_query_is_asked_alone(model, tokens):
    queries = make_documents([[1, 2, 3, 4], [5, 6]], [[-100, -100, 3, 4], [-100, 6]])
    both = answers(model, tokens, queries)
    assert both == [answers(model, tokens, queries.select([row]))[0] for row in (0, 1)]
