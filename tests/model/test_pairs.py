"""Fine-tuning data: prompts with responses and conversations; what cannot be learned is named by its line."""

from __future__ import annotations

import json

import pytest
from illada import Model, ModelConfig, save
from illada.chat import ChatTemplate
from illada.cli import main
from illada.errors import DataError
from illada.tokenizer import ByteTokenizer
from illada.training.data import Document
from illada.training.pairs import Pairs

TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role[0] }}]{{ m.content }}.{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)


def pairs(*lines: object, length: int = 8, **more) -> Pairs:
    text = "\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    return Pairs([Document("d", text.encode())], ByteTokenizer(), length, 2, seed=0, **more)


def said(*roles_and_texts: str) -> dict:
    names = {"s": "system", "u": "user", "a": "assistant"}
    return {"messages": [{"role": names[text[0]], "content": text[1:]} for text in roles_and_texts]}


def test_pairs_are_prompt_answer_and_end_of_text_to_the_right():
    made = pairs({"prompt": "ab", "response": "c"}, {"prompt": "x", "response": "123456789"}, length=6, cut=True)
    assert [(row.tolist(), n) for row, n in made.rows] == [
        ([97, 98, 99, 257, 257, 257], 2),
        ([120, 49, 50, 51, 52, 53], 1),
    ]
    tokens, lengths = made.batch(0)
    assert tokens.shape == (2, 6) and sorted(lengths.tolist()) == [1, 2]
    assert made.shortened == 1 and len(made.ids()) == 12


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", 'd, line 1: expected {"prompt"'),
        ("[1]", 'd, line 1: expected {"prompt"'),
        ({"prompt": "a"}, 'expected {"prompt"'),
        ({"prompt": "a", "response": 3}, 'expected {"prompt"'),
        ({"prompt": "abcdefgh", "response": "x"}, "d, line 1: the prompt has 8 tokens, which leaves no room"),
        ({"prompt": "a", "response": ""}, "the response is empty, so there is nothing to learn"),
        ({"prompt": "a", "response": " \n"}, "the response is empty, so there is nothing to learn"),
        (
            {"prompt": "ab", "response": "1234567"},
            "9 tokens, more than --length 8, as have 1 of 1 lines; give --l",
        ),
        ("", "found none"),
        (said("uHi", "aHo"), "messages need a chat template; start --from a folder"),
    ],
)
def test_a_bad_pair_is_named(line, message):
    with pytest.raises(DataError, match=message):
        pairs(line)


def test_all_rows_that_are_too_long_are_counted_with_the_length_that_holds_them():
    long = [{"prompt": "ab", "response": "1" * n} for n in (3, 20, 9)]
    with pytest.raises(DataError, match=r"line 3: .* 22 tokens, .* as have 2 of 3 lines; give --length 22, or --cut"):
        pairs(*long)


def test_a_conversation_s_last_answer_is_learned_with_what_ends_it():
    made = pairs(said("sBe.", "uHi", "aHo", "u?", "aYes"), length=40, template=TEMPLATE)
    row, prompt = made.rows[0]
    text = ByteTokenizer().decode(row.tolist())
    assert text.startswith("[s]Be..[u]Hi.[a]Ho.[u]?.[a]Yes.") and text[prompt:].startswith("Yes.")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (said("uHi"), "who speaks last, got user"),
        (said("uHi", "aHo", "uWell?"), "who speaks last, got user, assistant, user"),
        (said("aHo"), "who speaks last, got assistant"),
        (said("sBe", "aHo"), "who speaks last, got system, assistant"),
        (said(), "who speaks last, got none"),
        (said("uHi", "a "), "the assistant's last answer is empty"),
        ({"messages": "Hi"}, "expected messages like"),
        ({"messages": ["Hi"]}, "expected messages like"),
    ],
)
def test_a_conversation_of_one_side_or_without_an_answer_is_named(line, message):
    with pytest.raises(DataError, match="d, line 1: .*" + message):
        pairs(line, length=40, template=TEMPLATE)


def test_a_template_that_writes_the_past_anew_is_named():
    reverse = ChatTemplate("{% for m in messages | reverse %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match="writes the messages before the answer otherwise than with it"):
        pairs(said("uHi", "aHo"), length=40, template=reverse)


def test_the_command_refuses_long_responses_before_a_run_begins_or_says_how_many_it_cut(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps({"prompt": "1", "response": "2" * n}) + "\n" for n in (3, 90)))
    command = [
        "train",
        "--out",
        str(tmp_path / "run"),
        "--data",
        str(data),
        "--steps",
        "1",
        "--length",
        "32",
        "--quiet",
    ]
    for objective in (["--objective", "sft"], ["--objective", "block", "--pairs"]):
        assert main([*command, *objective]) == 2
        assert "line 2: prompt and response have 91 tokens" in capsys.readouterr().err
        assert not (tmp_path / "run").exists()
    assert main([*command, "--objective", "sft", "--cut"]) == 0
    assert "cut 1 of 2 responses at --length" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--pairs"], "pairs: expected an objective among packed, sft, block"),
        (["--pairs", "--objective", "block", "--hole-fraction", "0.5"], "without hole_fraction, got block"),
        (["--cut"], "cut: it is for pairs of prompt and response, and trajectories, only"),
        (["--objective", "sft", "--eval-every", "1"], "eval_every: expected --eval-data too"),
        (["--eval-data", "x"], "eval_data: it is for --eval-every only"),
        (["--lora", "4"], "lora: expected --from"),
        (["--workers", "-1"], "workers: expected at least 0, got -1"),
    ],
)
def test_settings_that_do_not_go_together_are_named(more, message, tmp_path, capsys):
    (tmp_path / "d").write_text(json.dumps({"prompt": "1", "response": "2"}) + "\n" + "x\n" * 40)
    command = ["train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "d"), "--steps", "1", "--quiet"]
    assert main([*command, *more]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_conversations_train_a_checkpoint_by_its_own_chat_template(tmp_path):
    sizes = {"dim": 16, "n_layers": 1, "n_heads": 1, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 32}
    base, out = tmp_path / "base", tmp_path / "run"
    save(Model(ModelConfig.preset("demo", **sizes)), base)
    (base / "illada_tokenizer.json").write_text(json.dumps({"kind": "bytes", "merges": []}))
    (tmp_path / "data").write_text(json.dumps(said("uHi", "aHo")) + "\n")
    command = ["train", "--out", str(out), "--data", str(tmp_path / "data"), "--from", str(base), "--objective", "sft"]
    command += ["--steps", "1", "--length", "16", "--batch-size", "1", "--quiet"]
    assert main(command) == 2  # no template there yet
    (base / "chat_template.jinja").write_text(TEMPLATE.source)
    assert main(command) == 0 and (out / "model.safetensors").exists()
