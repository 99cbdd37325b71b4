"""Chat templates: found where transformers finds them, rendered as transformers renders them."""

from __future__ import annotations

import json

import pytest
from illada import GenerationConfig, Model, ModelConfig, generate, save
from illada.chat import ChatTemplate, load_chat_template
from illada.cli import main
from illada.errors import DataError
from illada.tokenizer import ByteTokenizer

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hallo, wie geht's? \n"}]
SOURCES = {
    "llada": "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start|>' + "
    "message['role'] + '\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n\n' }}{% endif %}",
    "loops": "{%- for m in messages %}\n  {%- if m.role == 'system' %}{% continue %}{% endif %}\n"
    "  {{ m.content | tojson }}\n  {% generation %}{{ loop.index }}{% endgeneration %}\n{% endfor %}",
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("prompt", [True, False])
def test_templates_render_as_in_transformers(name, prompt):
    utils = pytest.importorskip("transformers.utils.chat_template_utils", reason="transformers is the oracle")
    options = {"add_generation_prompt": prompt, "bos_token": "<s>"}
    wanted = utils.render_jinja_template([MESSAGES], chat_template=SOURCES[name], **options)[0][0]
    assert ChatTemplate(SOURCES[name], {"bos_token": "<s>"}).render(MESSAGES, prompt) == wanted


def test_templates_are_found_where_transformers_finds_them(tmp_path):
    with pytest.raises(DataError, match=r"holds no chat template 'default'; expected it in chat_template\.jinja or"):
        load_chat_template(tmp_path)
    tokens = {"bos_token": {"content": "<s>", "lstrip": False}, "eos_token": "</s>", "pad_token": None}
    several = [{"name": "default", "template": "{{ eos_token }}"}, {"name": "tools", "template": "{{ bos_token }}"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**tokens, "chat_template": several}))
    assert (
        load_chat_template(tmp_path).render([]) == "</s>" and load_chat_template(tmp_path, "tools").render([]) == "<s>"
    )
    with pytest.raises(DataError, match="holds no chat template 'rag', only default, tools"):
        load_chat_template(tmp_path, "rag")
    (tmp_path / "chat_template.jinja").write_text("\ufeff{{ bos_token }}!", encoding="utf-8")
    assert load_chat_template(tmp_path).render([]) == "<s>!"


def test_what_a_template_refuses_is_an_error_in_its_words():
    with pytest.raises(DataError, match=r"does not take these messages \(roles must alternate\)"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([])
    with pytest.raises(DataError, match=r"chat template: not Jinja"):
        ChatTemplate("{% for")
    with pytest.raises(DataError, match="does not take these messages"):  # the sandbox
        ChatTemplate("{{ messages.__class__.__mro__ }}").render([])


def test_generate_puts_the_prompt_into_the_folder_s_template(tmp_path, capsys):
    model = Model(ModelConfig.preset("demo", n_layers=1)).eval()
    save(model, tmp_path)
    command = ["generate", "--model", str(tmp_path), "--prompt", "Hi", "--max-new-tokens", "4", "--device", "cpu"]
    assert main([*command, "--chat"]) == 2 and "holds no chat template" in capsys.readouterr().err
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].role }}: {{ messages[0].content }}\n->")
    assert main([*command, "--chat"]) == 0
    prompt = ByteTokenizer().encode(b"user: Hi\n->").tolist()
    wanted = generate(model, [prompt], GenerationConfig(max_new_tokens=4)).tokens[0]
    assert capsys.readouterr().out == "Hi\n" + ByteTokenizer().decode(wanted) + "\n"


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content + 1 }}",
        "{{ 1 // 0 }}",
        "{{ messages[7].content }}",
        "{{ '%d' % messages }}",
        "{% break %}",
    ],
)
def test_a_template_that_fails_is_one_line(source):
    with pytest.raises(DataError, match="chat template: "):
        ChatTemplate(source).render([{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "stored", [{"chat_template": [{"template": "x"}]}, {"chat_template": 5}, {"chat_template": {"default": 5}}]
)
def test_a_stored_template_that_is_no_text_is_named(stored, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="the chat template cannot be read"):
        load_chat_template(tmp_path)


def test_what_is_not_given_is_none_as_in_transformers():
    source = "{% if tools is not none %}TOOLS{% endif %}{{ documents is none }}"
    assert ChatTemplate(source).render([{"role": "user", "content": "Hi"}]) == "True"
