"""BOS: prompts begin with what the folder's tokenizer writes before a text, as transformers' do, and never twice."""

from __future__ import annotations

import json
import math

import pytest
from illada import GenerationConfig, generate, log_likelihood
from illada.cli import main
from illada.errors import DataError
from illada.tokenizer import from_json, load_tokenizer, stream
from illada.tokenizer_config import begun, bos_of
from illada.training.data import Document
from illada.training.pairs import Pairs

from tests.helpers import bos_folder

pytest.importorskip("tokenizers")
CHAT = "{{ bos_token }}[{{ messages[0].content }}]"


def read(folder):
    return load_tokenizer(folder, bos_folder.tokenizer().get_vocab_size(), 3, 1, 2)


def processors():
    from tokenizers import processors as p

    template = bos_folder.tokenizer().post_processor
    return {
        "none": None,
        "bytes": p.ByteLevel(),
        "template": template,
        "both sides": bos_folder.tokenizer("<s> $A </s>").post_processor,
        "behind": bos_folder.tokenizer("$A </s>").post_processor,
        "two": bos_folder.tokenizer("<s> <pad> $A").post_processor,
        "bert": p.BertProcessing(("</s>", 1), ("<s>", 0)),
        "roberta": p.RobertaProcessing(("</s>", 1), ("<s>", 0)),
        "sequence": p.Sequence([p.ByteLevel(), template]),
    }


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_the_default_is_what_transformers_writes_before_a_text(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the oracle")
    if transformers.__version__.startswith("4") and name == "LlamaTokenizer":
        pytest.skip("a class that writes BOS whatever tokenizer.json says")
    stated = [{}, {"add_bos_token": True}, {"add_bos_token": False}] if name == "PreTrainedTokenizerFast" else [{}]
    for says in stated:
        bos_folder.write(tmp_path, tokenizer_class=name, **says)
        for kind, processor in processors().items():
            made = bos_folder.tokenizer(None)
            if processor is not None:
                made.post_processor = processor
            made.save(str(tmp_path / "tokenizer.json"))
            theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
            text = theirs("ab", add_special_tokens=False)["input_ids"]
            whole, ours = theirs("ab")["input_ids"], read(tmp_path)
            assert ours.encode(b"ab").tolist() == text
            assert begun(text, ours.bos) == whole[: len(ours.bos) + len(text)], (name, kind, says)


@pytest.mark.parametrize("name", ["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize("single", ["<s> $A", "$A"])
def test_a_class_that_heeds_add_bos_token_follows_it(name, single, tmp_path):
    bos_folder.write(tmp_path, single=single, tokenizer_class=name, add_bos_token=False)
    assert read(tmp_path).bos == ()
    bos_folder.write(tmp_path, single=single, tokenizer_class=name, add_bos_token=True, bos_token={"content": "<s>"})
    assert read(tmp_path).bos == (0,)


def test_vocab_and_merges_of_gpt_2_follow_add_bos_token(tmp_path):
    bos_folder.write(tmp_path)
    bos_folder.tokenizer().model.save(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    for stated in (True, False):
        says = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "add_bos_token": stated}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
        assert read(tmp_path).bos == ((0,) if stated else ())


def test_bos_is_asked_for_by_name_and_an_error_where_there_is_none(tmp_path):
    bos_folder.write(tmp_path, single="$A")
    tokenizer = read(tmp_path)
    assert [bos_of(tmp_path, tokenizer, add) for add in (None, False, True)] == [[], [], [0]]
    for nothing in ({"bos_token": None}, {"bos_token": "<unheard>"}):
        bos_folder.write(tmp_path, single="$A", **nothing)
        with pytest.raises(DataError, match=r"add_bos_token: expected a bos_token in .*tokenizer_config\.json that"):
            bos_of(tmp_path, tokenizer, True)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match="expected an object, got list"):
        read(tmp_path)


def test_bos_is_never_doubled():
    assert begun([5, 6], [0]) == [0, 5, 6] and begun([0, 5], [0]) == [0, 5] and begun([5], []) == [5]
    assert begun([], [0]) == [0] and begun([0, 5], [0, 2]) == [0, 2, 0, 5]


@pytest.mark.parametrize("preset", [None, "LLaDA-8B"])
@pytest.mark.parametrize("options, first", [([], [0]), (["--add-bos-token"], [0]), (["--no-add-bos-token"], [])])
def test_generate_begins_prompts_as_the_tokenizer_does(preset, options, first, tmp_path, capsys):
    model = bos_folder.write(tmp_path, preset)
    tokenizer = read(tmp_path)
    command = ["generate", "--model", str(tmp_path), "--max-new-tokens", "6", "--device", "cpu", *options]

    def answer(prompt: bytes, bos: list[int]) -> str:
        ids = [*bos, *tokenizer.encode(prompt, special=True).tolist()]
        return tokenizer.decode(generate(model, [ids], GenerationConfig(max_new_tokens=6)).tokens[0])

    for prompt in ("on and", "<s>on and"):  # the second one writes its own
        assert main([*command, "--prompt", prompt]) == 0
        printed = capsys.readouterr().out.removeprefix(prompt)
        assert printed == answer(prompt.encode(), first if prompt == "on and" else []) + "\n"
    (tmp_path / "chat_template.jinja").write_text(CHAT)
    assert main([*command, "--prompt", "on", "--chat"]) == 0
    assert capsys.readouterr().out == "on\n" + answer(b"<s>[on]", []) + "\n"


def test_a_run_that_starts_from_a_folder_keeps_its_bos_and_pairs_begin_with_it(tmp_path):
    bos_folder.write(tmp_path)
    tokenizer = read(tmp_path)
    again = from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert again.bos == tokenizer.bos == (0,)
    saved = tokenizer.to_json()
    del saved["bos"]  # as runs of before have it, whose texts had none
    assert from_json(saved).bos == ()
    lines = [{"prompt": "on", "response": "and"}, {"prompt": "<s>on", "response": "and"}]
    text = "\n".join(map(json.dumps, lines)).encode()
    (first, length), (second, _) = Pairs([Document("x.jsonl", text)], again, 12, 1, 0).rows
    assert first.tolist() == second.tolist() and first[0] == 0 and 0 not in first[1:]
    assert length == 1 + len(tokenizer.encode(b"on"))


@pytest.mark.parametrize("options, first", [([], [0]), (["--add-bos-token"], [0]), (["--no-add-bos-token"], [])])
def test_bits_per_byte_are_of_documents_that_begin_as_the_tokenizer_does(options, first, tmp_path, capsys, monkeypatch):
    model, text = bos_folder.write(tmp_path), b"on and on and on"
    monkeypatch.setattr("illada.training.runs.documents", lambda data: ([Document("x", text)],) * 2)
    assert main(["eval", "--model", str(tmp_path), "--data", "x", "--length", "64", "--device", "cpu", *options]) == 0
    ids = [*read(tmp_path).encode(text).tolist(), 1]
    nats = log_likelihood(model, [[1] * 32 + first], [ids], method="autoregressive").item()  # behind a text's end
    bits = float(capsys.readouterr().out.split()[0])
    assert bits == pytest.approx(-nats / math.log(2) / len(text), abs=1e-4)


def test_documents_of_a_run_begin_with_its_bos(tmp_path):
    bos_folder.write(tmp_path)
    tokenizer = read(tmp_path)
    documents = [Document("x", b"on"), Document("y", b"and")]
    on, and_ = (tokenizer.encode(document.content).tolist() for document in documents)
    assert stream(documents, tokenizer).tolist() == [0, *on, 1, 0, *and_, 1]
    assert stream(documents, tokenizer, ()).tolist() == [*on, 1, *and_, 1]
