"""The adapter for lm-evaluation-harness: what the harness gets is what our own functions give, in both of its versions.

The harness runs in a process of its own, from a folder that `make build/lm-eval-0.5` fills; a local task file, no
network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from illada import GenerationConfig, Model, ModelConfig, generate, load, log_likelihood, save
from illada.likelihood import is_greedy
from illada.tokenizer import ByteTokenizer

from illada_kernels import KeyRanges

ROOT = Path(__file__).parents[2]
VERSIONS = {"0.4": ["lm-eval-0.4"], "0.5": ["lm-eval-0.5", "lm-eval-0.4"]}  # 0.5 shares what 0.4 needs
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<ai>{% endif %}"
)
DOCUMENTS = [
    {
        "q": f"{i} plus {i * i} =",
        "choices": [str(i + i * i), "no idea"],
        "gold": i % 2,
        "text": "on and on " * (4 * i + 1),
    }
    for i in range(5)
]
TASKS = {
    "choice": """
        output_type: multiple_choice
        doc_to_text: "{{q}}"
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{gold}}"
        """,
    "answer": """
        output_type: generate_until
        doc_to_text: "{{q}}"
        doc_to_target: "{{choices[0]}}"
        generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 9, do_sample: false}
        metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
        """,
    "rolling": """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
        metric_list: [{metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}]
        """,
}


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model(ModelConfig.preset("demo", n_layers=1, max_seq_len=64)).eval()


@pytest.fixture(scope="module", params=VERSIONS)
def harness(request, model, tmp_path_factory) -> SimpleNamespace:
    """What the harness of one version found by every door."""
    folders = [ROOT / "build" / name for name in VERSIONS[request.param]]
    if not all((folder / "lm_eval").is_dir() or "0.4" in folder.name for folder in folders):
        pytest.skip(f"{folders[0]} holds no lm_eval: `make build/lm-eval-0.5` installs it")
    if not (folders[-1] / "datasets").is_dir():
        pytest.skip(f"{folders[-1]} holds no datasets: `make build/lm-eval-0.5` installs them")
    folder = tmp_path_factory.mktemp("harness")
    save(model, folder / "model")
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "data.jsonl").write_text("\n".join(json.dumps(document) for document in DOCUMENTS))
    (folder / "tasks").mkdir()
    for name, text in TASKS.items():
        source = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder}/data.jsonl}}}}\ntest_split: test"
        lines = "\n".join(line.strip() for line in text.splitlines())
        (folder / "tasks" / f"{name}.yaml").write_text(f"task: local_{name}\n{source}\n{lines}")
    paths = [str(ROOT), str(ROOT / "python"), *map(str, folders)]
    environment = {**os.environ, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    ran = subprocess.run(
        [sys.executable, ROOT / "tests" / "helpers" / "lm_eval_run.py", folder / "model", folder / "tasks"],
        env={**environment, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return SimpleNamespace(folder=folder, **json.loads(ran.stdout.splitlines()[-1]))


def ids(text: str) -> list[int]:
    return ByteTokenizer().encode(text.encode()).tolist()


def likelihood(model: Model, context: list[int], continuation: list[int]) -> float:
    return log_likelihood(model, [context], [continuation], samples=4, seed=3).item()


def next_tokens(model: Model, context: list[int], continuation: list[int], forbid: bool = False) -> float:
    """log p of a continuation by the rows before its tokens, under a causal mask."""
    tokens = torch.tensor([context + continuation])
    with torch.no_grad():
        hidden = model(tokens, KeyRanges.causal(tokens.shape[1]), shift=False)[0]
    logits = (hidden @ model.head_weight.T).double()
    if forbid:
        logits[:, model.config.mask_id] = -torch.inf
    rows = logits.log_softmax(-1)[len(context) - 1 : -1]
    return rows.gather(1, tokens[0, len(context) :, None]).sum().item()


def arguments(sample: dict) -> list[list]:
    """The arguments of a sample's requests; versions log them as lists or as dicts."""
    logged = sample["arguments"]
    if isinstance(logged, dict):
        logged = [list(request.values()) for request in logged.values()]
    return [list(request) for request in logged]


def test_likelihoods_are_those_of_log_likelihood(harness, model):
    some = harness.samples["local_choice"]
    assert len(some) == 5
    for sample, document in zip(some, DOCUMENTS):
        for (found, greedy), choice in zip((answer[0] for answer in sample["resps"]), document["choices"]):
            pair = (ids(document["q"]), ids(f" {choice}"))
            assert float(found) == pytest.approx(likelihood(model, *pair), rel=1e-5)
            assert str(greedy) == str(is_greedy(model, [pair[0]], [pair[1]])[0])


def test_answers_are_those_of_generate_cut_at_until(harness, model):
    config = GenerationConfig(max_new_tokens=9, block_length=9)
    for sample, document in zip(harness.samples["local_answer"], DOCUMENTS):
        text = ByteTokenizer().decode(generate(model, [ids(document["q"])], config).tokens[0])
        assert sample["resps"] == [[text.split("\n")[0].split("e")[0]]]


def test_rolling_likelihood_counts_every_token_once_in_windows_of_the_context_length(harness, model):
    total = 0.0
    for sample, document in zip(harness.samples["local_rolling"], DOCUMENTS):
        tokens = ids(document["text"])
        wanted = likelihood(model, [], tokens[:64])
        for start in range(64, len(tokens), 63):
            end = min(start + 63, len(tokens))
            wanted += likelihood(model, tokens[max(0, end - 64) : start], tokens[start:end])
        assert first(sample["resps"]) == pytest.approx(wanted, rel=1e-5)
        total += wanted
    size = sum(len(document["text"]) for document in DOCUMENTS)
    bits = harness.results["local_rolling"]["bits_per_byte,none"]
    assert float(bits) == pytest.approx(-total / size / torch.log(torch.tensor(2.0)).item(), rel=1e-5)


def test_chat_templates_make_the_prompts(harness):
    for task in ("local_choice", "local_answer"):
        assert arguments(harness.chat[task][0])[0][0] == f"<user>{DOCUMENTS[0]['q']}<ai>"


def test_both_commands_print_the_same_table(harness):
    for table in (harness.module, harness.command):
        accuracy = re.search(r"\|acc +\|↑ +\| *([0-9.]+)\|", table)
        assert "local_choice" in table and accuracy
        assert float(accuracy[1]) == pytest.approx(float(harness.results["local_choice"]["acc,none"]), abs=5e-5)


def test_what_is_drawn_from_is_bounded_where_there_is_a_temperature(harness):
    assert harness.truncations == [[0.9, 5, 0.1]] + 3 * [[None, None, None]]


def test_settings_that_are_not_known_are_named(harness):
    found = vars(harness)
    assert found["unknown model_args"].startswith("model_args: blok_length is not known; expected block_length, cache")
    assert found["guidance"] == "guidance: expected a number of at least 0, got -0.5; 0 is no guidance"
    assert found["unknown gen_kwargs"].startswith("gen_kwargs: typical_p is not known; expected block_length, cache")
    assert found["too long"] == "max_gen_toks: expected less than the model's max_seq_len = 64, got 99 for request 0"


def test_an_autoregressive_folder_without_a_mask_token_is_scored_and_decoded(harness, tmp_path):
    found, model = harness.from_left, load(harness.folder / "model-from-left")
    assert model.config.mask_id == -1 and found["mask_id"] == 256 and found["method"] == "autoregressive"
    pairs = [(ids("x" * 61), ids(" yes")), (ids("a"), ids(" yes")), ([257], ids("b"))]
    for (value, greedy), (context, continuation) in zip(found["pairs"], pairs, strict=True):
        assert value == pytest.approx(next_tokens(model, context, continuation), rel=1e-5) and greedy is False
    text = ids("z" * 150)
    # as the harness's own windows: 65 tokens, of which the last is no input
    parts = [([257], text[:64]), (text[63:64], text[64:128]), (text[85:128], text[128:])]
    assert found["rolling"][0] == pytest.approx(sum(next_tokens(model, *part) for part in parts), rel=1e-5)
    for answer, prompt in zip(found["answers"], [ids("y" * 59), ids("a")], strict=True):
        config = GenerationConfig(max_new_tokens=5, stop_ids=None)
        assert answer == ByteTokenizer().decode(generate(model, [prompt], config).tokens[0]).partition("\n")[0]


def test_what_loses_its_first_tokens_is_said_and_what_cannot_fit_is_named(harness):
    first, last = harness.from_left["lines"]
    assert first.startswith(
        "1 of 3 requests exceed max_seq_len = 64 and lose their first tokens; request 0 the most, 19"
    )
    assert last.startswith("1 of 2 requests exceed")
    assert harness.from_left["too long"].startswith("request 1: expected a continuation of at most 64 tokens")


def test_clean_rows_that_predict_are_read_by_default(harness):
    model = load(harness.folder / "model-joint")
    right = next_tokens(model, ids("ab"), ids("cd"), forbid=True)
    assert harness.joint["autoregressive"] == pytest.approx(right, rel=1e-5)
    assert harness.joint["confidence"] != pytest.approx(right, rel=1e-3)


def test_joint_models_answer_without_a_sampler_being_named(harness):
    model = load(harness.folder / "model-joint")
    config = GenerationConfig(max_new_tokens=5, sampler="self-speculation")
    wanted = [generate(model, [prompt], config).tokens[0] for prompt in (ids("ab"), [model.config.eos_id])]
    answers = [ByteTokenizer().decode(tokens).partition("\n")[0] for tokens in wanted]
    assert harness.joint["answers"] == [answers, answers]
    every, until = harness.joint["passes"]
    assert until < every / 2  # the second character's end is soon
    assert harness.joint["hot"].endswith("greedy; models with next_token have it by default: name another")


def test_contexts_begin_with_bos_as_those_of_the_harness_s_own_model(harness):
    default, asked, none = harness.beside
    assert [one["bos"] for one in harness.beside] == [[0], [0], []] and default["ours"] == asked["ours"]
    for one in harness.beside:
        ours, theirs = one["ours"], one["theirs"]
        for kind in ("pairs", "chat pairs"):
            for (value, greedy), (other, same) in zip(ours[kind], theirs[kind], strict=True):
                assert value == pytest.approx(other, rel=1e-5) and greedy == same
        assert ours["answers"] == theirs["answers"] and ours["chat"] == theirs["chat"]
        assert ours["chat"] == default["ours"]["chat"]  # the template writes BOS, whatever is asked for
    assert default["ours"]["answers"] != none["ours"]["answers"]
    assert default["ours"]["pairs"][1] == none["ours"]["pairs"][1]  # an empty context is BOS in any case
    # There BOS is put before a text that begins with it; here it comes once.
    [wanted] = none["theirs"]["rolling"]
    for one in harness.beside:
        assert first(one["ours"]["rolling"]) == pytest.approx(first(wanted), rel=1e-5)


def first(found: Any) -> float:
    while isinstance(found, list):  # 0.5 has a pair where 0.4 has a number
        found = found[0]
    return float(found)
