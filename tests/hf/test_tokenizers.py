import json
import shutil
from types import SimpleNamespace

import pytest

from gradfn.errors import InputError
from gradfn.hf import load_tokenizer, tokenizer_fingerprint
from gradfn.hf.chats import _templated
from gradfn.hf.texts import _encode, _encode_side
from gradfn.hf.tokenizers import no_panic


def test_tokenizer_inside_gguf(gguf_file, llama_folder):
    text = "The capital of France is Paris."
    expected = load_tokenizer(llama_folder)(text, add_special_tokens=False).input_ids
    for path in (gguf_file, gguf_file.parent):
        assert load_tokenizer(path)(text, add_special_tokens=False).input_ids == expected


def test_tokenizer_beside_gguf_comes_first(gguf_file, neox_folder, tmp_path):
    shutil.copy(gguf_file, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(neox_folder / name, tmp_path)
    expected = tokenizer_fingerprint(load_tokenizer(neox_folder))
    assert tokenizer_fingerprint(load_tokenizer(tmp_path)) == expected
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / gguf_file.name)) == expected


def test_a_tokenizer_round_trip(llama_folder):
    tokenizer = load_tokenizer(str(llama_folder))
    ids = tokenizer("The capital of Peru").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "The capital of Peru"


def test_a_model_without_a_tokenizer(copy):
    for file in copy.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(
        InputError, match=r"copy holds no tokenizer, only config.json, .*tokenizer.save_pretrained"
    ):
        load_tokenizer(copy)


def test_a_broken_tokenizer(copy):
    (copy / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"the tokenizer .* cannot be loaded"):
        load_tokenizer(copy)


def test_tokenizer_fingerprints(tokenizers, tmp_path):
    prints = {kind: tokenizer_fingerprint(tokenizer) for kind, tokenizer in tokenizers.items()}
    assert len(set(prints.values())) == len(prints)
    tokenizers["bos"].save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert tokenizer_fingerprint(again) == prints["bos"]
    again.pad_token = "</s>"
    assert again(["a b c", "a"], truncation=True, max_length=2, padding="max_length").input_ids[0][0] == 1
    assert json.loads(again.backend_tokenizer.to_str())["truncation"] is not None
    assert tokenizer_fingerprint(again) == prints["bos"]
    again.add_tokens(["<new>"])
    assert tokenizer_fingerprint(again) != prints["bos"]
    prints["new"] = tokenizer_fingerprint(again)
    again.chat_template = "{{ messages }}"
    assert tokenizer_fingerprint(again) not in prints.values()


def test_expressions_that_give_up_are_no_crash():
    """A real panic takes seconds: this one has its class, which derives from BaseException alone."""
    panic = type("PanicException", (BaseException,), {})

    def give_up(*_, **__):
        raise panic("Regex search error: retry-limit-in-match over")

    for told in (BaseException, KeyboardInterrupt):
        with pytest.raises(told), no_panic():
            raise told
    stub = SimpleNamespace(apply_chat_template=give_up)
    for call in (
        lambda: _encode(give_up, ["x"]),
        lambda: _encode_side(give_up, ["x"], target=True),
        lambda: _templated(stub, [], "0"),
    ):
        with pytest.raises(InputError, match=r"cannot split the texts .*retry-limit.*: mend the expressions"):
            call()
