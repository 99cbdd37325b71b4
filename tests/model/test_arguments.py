"""Arguments of generate, fill and fill_hole: any integer type works, a wrong one is named; masks are never proposed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from illada import Decoder, GenerationConfig, PromptError, fill, generate
from illada.decoding.fill import fill_hole

from illada_kernels import Renoise, Threshold, TopK
from tests.helpers.models import make, tiny

MODEL = make(tiny())
PLAIN = {"max_new_tokens": 8, "block_length": 4, "temperature": 1.0, "stop_ids": ()}


def tokens(prompts=([3, 4],), **changes):
    return generate(MODEL, prompts, GenerationConfig(**{**PLAIN, **changes})).tokens


@pytest.mark.parametrize(
    "same, other",
    [
        ({"seed": 3}, {"seed": np.int64(3)}),
        ({"seed": 3}, {"seed": torch.tensor(3)}),
        ({"seed": 3}, {"seed": np.array([3])}),
        ({"seed": -1}, {"seed": 2**64 - 1}),
        ({"max_new_tokens": 8}, {"max_new_tokens": np.int32(8), "block_length": torch.tensor(4)}),
        ({"stop_ids": (5,)}, {"stop_ids": 5}),
        ({"stop_ids": (5, 6)}, {"stop_ids": torch.tensor([6, 5])}),
        ({"stop_ids": (5, 6)}, {"stop_ids": {5, 6}}),
        ({"forbid": (5, 49)}, {"forbid": np.array([5])}),
        ({"logit_bias": ([7, 8], [3.0, -2.0])}, {"logit_bias": {7: 3.0, 8: -2.0}}),
        ({"logit_bias": ([7, 8], [3.0, -2.0])}, {"logit_bias": (torch.tensor([7, 8]), torch.tensor([3.0, -2.0]))}),
        ({"temperature": 0.5}, {"temperature": np.float64(0.5)}),
        ({"temperature": 0.5}, {"temperature": torch.tensor(0.5)}),
    ],
)
def test_numbers_of_any_type_mean_the_same(same, other):
    assert tokens(**other) == tokens(**same)


def test_prompts_of_any_type_mean_the_same():
    wanted = tokens([[3, 4], [5, 6]])
    for prompts in (
        np.array([[3, 4], [5, 6]]),
        torch.tensor([[3, 4], [5, 6]]),
        [np.array([3, 4]), torch.tensor([5, 6])],
    ):
        assert tokens(prompts) == wanted
    assert tokens([[torch.tensor(3), np.int8(4)], (5, 6)]) == wanted


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"max_new_tokens": 8.0}, "max_new_tokens: expected an integer of at least 1, got 8.0"),
        ({"max_new_tokens": None}, "max_new_tokens: expected an integer of at least 1, got None"),
        ({"block_length": "4"}, "block_length: expected an integer of at least 1, got '4'"),
        ({"block_length": 0}, "block_length: expected at least 1, got 0"),
        ({"block_length": True}, "block_length: expected an integer of at least 1, got True"),
        ({"revise_steps": -1}, "revise_steps: expected at least 0, got -1"),
        ({"seed": 2**64}, r"seed: expected an integer from -2\*\*63 to 2\*\*64 - 1"),
        ({"seed": 3.0}, "seed: expected an integer from .* got 3.0"),
        ({"seed": None}, "seed: expected an integer from .* got None"),
        ({"stop_ids": "</s>"}, r"stop_ids: expected ids in \[0, 50\), got '</s>'"),
        ({"stop_ids": [50]}, r"stop_ids: expected ids in \[0, 50\), got 50"),
        ({"forbid": [1.5]}, r"forbid: expected ids in \[0, 50\), got 1.5"),
        ({"logit_bias": {7: float("inf")}}, "logit_bias: expected a finite number, got inf"),
        ({"logit_bias": {50: 1.0}}, r"logit_bias: expected ids in \[0, 50\), got 50"),
        ({"logit_bias": ([7, 8], [1.0])}, "logit_bias: expected a value for each id, got 2 ids and 1 values"),
        ({"logit_bias": 3}, "logit_bias: expected {id: value} or"),
        ({"temperature": "hot"}, "temperature: expected a finite number, got 'hot'"),
        ({"top_k": 0, "temperature": 1.0}, "top_k: expected at least 1, got 0"),
        ({"top_k": 2.5, "temperature": 1.0}, "top_k: expected an integer of at least 1, got 2.5"),
        ({"top_p": 1.5, "temperature": 1.0}, "top_p: expected a number from 0 to 1, got 1.5"),
        ({"top_p": "most", "temperature": 1.0}, "top_p: expected a finite number, got 'most'"),
        ({"min_p": -0.1, "temperature": 1.0}, "min_p: expected a number from 0 to 1, got -0.1"),
        ({"top_p": 0.9, "temperature": 0}, "top_p: expected None at temperature 0, where nothing is drawn, got 0.9"),
        ({"rule": lambda now: Renoise(0.1)}, "rule: expected one that fills masks, got Renoise; use sampler='canvas'"),
        ({"rule": Renoise(0.1)}, "rule: expected None or one of TopK, Threshold, Factor, EntropyBound, got Renoise"),
        ({"guidance": None}, "guidance: expected a finite number, got None"),
        ({"guidance": True}, "guidance: expected a finite number, got True"),
        ({"guidance": -1.0}, r"guidance: expected a number of at least 0, got -1\.0; 0 is no guidance"),
        (
            {"rule": Threshold(0.1), "confidence": "neg_entropy"},
            'Threshold.tau with confidence="neg_entropy": expected',
        ),
        ({"rule": Threshold(-0.1)}, "Threshold.tau with confidence=.probability.: expected"),
        ({"rule": TopK(torch.tensor([1, 2, 3, 4, 5, 6]))}, r"TopK.k: expected shape \(\d,\), got \(6,\)"),
        ({"rule": 0.9}, "rule: expected None or one of TopK, Threshold, Factor, EntropyBound, got 0.9"),
        ({"revise": TopK(1)}, "revise: expected None or one of Edit, Remask"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(PromptError, match=message):
        tokens(**changes)


def test_a_decoder_names_a_rule_that_it_cannot_run_before_any_sequence_is_lost():
    with pytest.raises(PromptError, match="Threshold"):
        Decoder(make(tiny()), GenerationConfig(max_new_tokens=4, rule=Threshold(0.1), confidence="neg_entropy"))
    with pytest.raises(PromptError, match=r"max_length: expected 1 \(max_new_tokens\) to .* got True"):
        Decoder(make(tiny()), GenerationConfig(max_new_tokens=1), max_length=True)


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([3, 4], "prompt 0: expected token ids, got int; put the prompt in a list"),
        (torch.tensor([3, 4]), r"prompt 0: expected integers \(n,\), got .*; put the prompt in a list"),
        ({"input_ids": [[3]]}, "prompts: expected a list of token lists, got dict; pass its input_ids"),
        ([[3.7]], r"prompt 0: expected ids in \[0, 50\), got 3.7"),
        ([[True]], r"prompt 0: expected ids in \[0, 50\), got True"),
        (np.array([[0.5]]), "prompt 0: expected integers"),
        ([None], "prompt 0: expected token ids, got NoneType"),
        (b"ab", "prompts: expected a list of token lists, got bytes; encode text first"),
    ],
)
def test_a_wrong_prompt_is_named(prompts, message):
    with pytest.raises(PromptError, match=message):
        tokens(prompts)


def test_the_mask_is_never_proposed_whatever_is_forbidden():
    model = make(tiny())
    with torch.no_grad():
        model.head_weight[49] = model.head_weight.abs().max() * 9  # the mask would win half of all draws
    for forbid in ([48], (), [49], None):
        config = GenerationConfig(max_new_tokens=16, temperature=1.0, forbid=forbid, stop_ids=())
        assert all(49 not in text for text in generate(model, [[i] for i in range(8)], config).tokens)
        assert 49 not in fill(model, [[1, 49, 49, 2]], GenerationConfig(forbid=forbid)).tokens[0]


def test_a_hole_is_checked_before_and_after():
    model = make(tiny("SDAR-8B"))
    assert 49 not in fill_hole(model, np.array([1, 2, 3]), 3, torch.tensor([4]), seed=np.int64(2))
    with pytest.raises(PromptError, match=r"fill_hole: expected text without mask_id \(49\); the hole alone is filled"):
        fill_hole(model, [1, 49], 3, [])
    with pytest.raises(PromptError, match=r"fill_hole: text 1: expected ids in \[0, 50\), got 50"):
        fill_hole(model, [1], 3, [50])
    model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="3 positions stayed masked"):
        fill_hole(model, [1, 2, 3], 3, [])


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("changes", [{}, {"variable_length": False}, {"rule": TopK(2)}, {"guidance": 0.5}])
def test_an_empty_prompt_does_not_depend_on_the_batch(changes, threads):
    """In float32 all rows are equal but for rounding, which differs from batch to batch."""
    torch.set_num_threads(threads)
    for seed in range(12):
        model = make(tiny(), seed, torch.float32)
        config = GenerationConfig(max_new_tokens=6, block_length=3, stop_ids=(), **changes)
        assert generate(model, [[]], config).tokens[0] == generate(model, [[1, 2, 3, 4], []], config).tokens[1]


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_text_of_masks_does_not_depend_on_the_batch(threads):
    torch.set_num_threads(threads)
    for seed in range(12):
        model = make(tiny(), seed, torch.float32)
        alone = fill(model, [[49] * 4], GenerationConfig()).tokens[0]
        assert fill(model, [[1, 2, 3, 4, 49, 5], [49] * 4], GenerationConfig()).tokens[1] == alone


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_torch_s_default_device_and_dtype_change_nothing(dtype):
    blocks = make(tiny("SDAR-8B"))
    calls = (
        lambda: tokens(logit_bias={3: 1.0}, seed=5),
        lambda: fill(MODEL, [[1, 49, 2], [49]]).tokens,
        lambda: fill_hole(blocks, [1, 2], 3, [4]),
        lambda: generate(blocks, [[1]], GenerationConfig(max_new_tokens=8)).tokens,
    )
    wanted = [call() for call in calls]
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            assert [call() for call in calls] == wanted
    finally:
        torch.set_default_dtype(torch.float32)
