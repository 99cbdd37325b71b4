"""attn_implementation="illada" gives what "sdpa" gives, in transformers 4.57 and 5."""

from __future__ import annotations

import collections
import copy
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="no transformers")

from transformers import masking_utils  # noqa: E402

from illada_kernels import KeyRanges, _dispatch  # noqa: E402
from illada_kernels.integrations import transformers as illada  # noqa: E402
from illada_kernels.integrations._stand_ins import scaled_dot_product_attention as stand_in  # noqa: E402
from illada_kernels.ops.attention.op import OPERATOR  # noqa: E402
from illada_kernels.ops.attention.problem import Problem  # noqa: E402

ROOT = Path(__file__).parents[2]
OLDER = ROOT / "build" / "transformers-4.57"
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
V5 = int(transformers.__version__.partition(".")[0]) >= 5
DECODERS = {
    "Llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**SIZES)),
    "Qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**SIZES, head_dim=16)),
    "Mistral, window of 5": (transformers.MistralForCausalLM, transformers.MistralConfig(**SIZES, sliding_window=5)),
}
ENCODERS = {
    "ModernBert": (
        transformers.ModernBertModel,
        transformers.ModernBertConfig(
            **SIZES, local_attention=6, global_attn_every_n_layers=2, reference_compile=False
        ),
    ),
    "Bert": (
        transformers.BertModel,
        transformers.BertConfig(**SIZES, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0),
    ),
}
if not V5:
    ENCODERS = {}  # in 4.57 they do not ask the interface


@pytest.fixture(autouse=True)
def registered():
    illada.register()


def padding(side):
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, :4] = 0
    return mask if side == "left" else mask.flip(1)


def run(model, implementation, **inputs):
    """Outputs at real tokens and the gradients of a loss on them."""
    model.set_attn_implementation(implementation)
    assert model.config._attn_implementation == implementation
    model.zero_grad()
    output = model(**inputs)
    states = output.logits if hasattr(output, "logits") else output.last_hidden_state
    real = inputs.get("attention_mask")
    states = states if real is None or real.dim() != 2 else states[real.bool()]
    states.square().sum().backward()
    return states.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def assert_as_sdpa(model, **inputs):
    (right, gradients), (ours, our_gradients) = (run(model, name, **inputs) for name in ("sdpa", "illada"))
    torch.testing.assert_close(ours, right, rtol=1e-5, atol=1e-5)
    scale = max(g.abs().max() for g in gradients)
    for a, b in zip(our_gradients, gradients, strict=True):
        assert (a - b).abs().max() <= 1e-5 * scale


def build(models, name):
    torch.manual_seed(0)
    kind, config = models[name]
    return kind(config).eval(), torch.randint(3, 99, (2, 12))


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_outputs_and_gradients(name, side):
    model, ids = build(DECODERS | ENCODERS, name)
    assert_as_sdpa(model, input_ids=ids, **({} if side is None else {"attention_mask": padding(side)}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_errors_against_float64_are_at_most_twice_those_of_sdpa(name, dtype):
    """The numerics bar of the ops, through a whole model: outputs, and each gradient."""
    model, ids = build(DECODERS | ENCODERS, name)
    inputs = {"input_ids": ids, "attention_mask": padding("left")}
    model.to(dtype)
    exact = run(copy.deepcopy(model).double(), "sdpa", **inputs)
    theirs, ours = (run(model, one, **inputs) for one in ("sdpa", "illada"))

    def errors(found):
        gradients = [float((a - b).abs().max()) for a, b in zip(found[1], exact[1], strict=True)]
        return [float((found[0] - exact[0]).abs().max()), *gradients]

    sizes = [float(x.abs().max()) for x in (exact[0], *exact[1])]
    for mine, torchs, size in zip(errors(ours), errors(theirs), sizes):
        assert mine <= 2 * torchs + torch.finfo(dtype).eps * size


@pytest.mark.parametrize("name", DECODERS)
def test_packed_documents_by_their_position_ids(name):
    model, ids = build(DECODERS, name)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None].repeat(2, 1)
    assert_as_sdpa(model, input_ids=ids, position_ids=positions, use_cache=False)


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_the_users_own(additive):
    model, ids = build(DECODERS, "Llama")
    mask = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    mask[0, :, :, 3:6] = False
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert_as_sdpa(model, input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generation_with_padding_and_a_cache(name, cache):
    model, ids = build(DECODERS, name)
    tokens = []
    for implementation in ("sdpa", "illada"):
        model.set_attn_implementation(implementation)
        options = {"cache_implementation": "static"} if cache == "static" else {}
        tokens.append(
            model.generate(input_ids=ids, attention_mask=padding("left"), max_new_tokens=10, do_sample=False, **options)
        )
    assert torch.equal(*tokens)


def test_training_with_gradient_checkpointing():
    model, ids = build(DECODERS, "Llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert_as_sdpa(model, input_ids=ids, attention_mask=padding("left"), labels=ids, use_cache=False)


def test_compiles_with_the_model():
    model, ids = build(DECODERS, "Llama")
    model.set_attn_implementation("illada")
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


# ---- masks -----------------------------------------------------------------------------------------------------------

left_padding = torch.tensor([0, 3])
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "packed": masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.tensor([[0] * 5 + [1] * 7, [0] * 3 + [1] * 3 + [2] * 6])),
    ),
    "chunked": masking_utils.chunked_causal_mask_function(5, left_padding),
    "a user's": lambda b, h, q, k: (k <= q) | (k >= 10),
}
if V5:
    FUNCTIONS |= {
        "bidirectional": masking_utils.bidirectional_mask_function,
        "window on both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    }


def bounds_of(function, queries, offset, mask, kv_offset=0, kv_length=12):
    if V5:
        where = {"q_length": queries, "q_offset": offset}
    else:
        where = {"cache_position": torch.arange(queries) + offset}
    common = {"batch_size": 2, "kv_length": kv_length, "kv_offset": kv_offset, "mask_function": function}
    common |= {"attention_mask": mask, "allow_is_causal_skip": False, **where}
    right = masking_utils.sdpa_mask(**common)
    ours = KeyRanges(illada.mask_bounds(**common)[:, 0], kv_length).dense()
    return ours.expand(2, queries, kv_length), right.expand(2, 1, queries, kv_length)[:, 0]


@pytest.mark.parametrize("kind", ["none", "left", "right", "gaps", "short"])
@pytest.mark.parametrize("queries, offset", [(12, 0), (3, 9), (1, 6)])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_masks_are_those_of_sdpa(name, queries, offset, kind):
    mask = None if kind == "none" else padding("right" if kind == "right" else "left").bool()
    if kind == "gaps":
        mask[0, 2] = False
    if kind == "short":
        mask = mask[:, :9]
    if name == "packed" and queries < 12:
        pytest.skip("documents are packed without a cache")
    if kind == "gaps" and name in ("a user's",):
        pytest.skip("needs three ranges")
    ours, right = bounds_of(FUNCTIONS[name], queries, offset, mask)
    assert torch.equal(ours, right)


def test_a_cache_of_the_last_keys_of_a_window():
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[1, :10] = False
    ours, right = bounds_of(FUNCTIONS["window"], 2, 18, mask, kv_offset=8, kv_length=12)
    assert torch.equal(ours, right)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name not in ("chunked", "a user's")])
def test_known_masks_are_never_made_dense(name, monkeypatch):
    monkeypatch.setattr(KeyRanges, "from_dense", lambda mask: pytest.fail("a dense mask"))
    gap = padding("left").bool()
    gap[0, 2] = False
    for mask in (None, padding("left").bool(), gap):
        bounds_of(FUNCTIONS[name], 12, 0, mask)


def test_masks_of_numbers_alone_are_made_once(monkeypatch):
    if not V5:
        pytest.skip("4.57 gives positions as a tensor")
    options = {"batch_size": 2, "q_length": 7, "kv_length": 7, "mask_function": FUNCTIONS["causal"]}
    with torch.inference_mode():
        first = illada.mask_bounds(**options)
    assert illada.mask_bounds(**options) is first and not first.is_inference()
    assert illada.mask_bounds(**options | {"q_offset": 2, "kv_length": 9}) is not first
    monkeypatch.setattr(illada, "reuse", lambda device: None)  # as while a CUDA graph is captured
    assert torch.equal(again := illada.mask_bounds(**options), first) and again is not first


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_layer_costs_views_and_the_op_alone(name):
    """Nothing of a layer is copied, made dense or waited for; masks are made once a forward."""
    kind, config = (DECODERS | ENCODERS)[name]
    counts = {}
    for layers in (2, 4):
        more = copy.deepcopy(config)
        more.num_hidden_layers = layers
        if hasattr(more, "layer_types"):
            more.layer_types = more.layer_types * (layers // 2) if more.layer_types else None
        model = kind(more).eval()
        for implementation in ("sdpa", "illada"):
            model.set_attn_implementation(implementation)
            with torch.no_grad(), Calls() as calls:
                model(torch.randint(3, 99, (2, 12)), attention_mask=padding("left"))
            counts[implementation, layers] = collections.Counter(calls.names)
    ours, theirs = (counts[one, 4] - counts[one, 2] for one in ("illada", "sdpa"))  # two layers
    added = ours - theirs
    assert added.pop("illada_kernels::attention") == 2
    assert set(added) <= {"aten::transpose.int", "aten::select.int", "aten::view", "aten::unsqueeze"}
    assert counts["illada", 4]["aten::_local_scalar_dense"] <= 2  # of the padding, once for each kind of layer


def test_a_head_dim_that_no_gpu_kernel_takes_falls_back_and_says_why(monkeypatch, logged):
    for one in OPERATOR.backends:
        if one.devices == ("cuda",):
            monkeypatch.setattr(one.module(), "available", lambda: None)
    monkeypatch.setattr(_dispatch._proven, "proven", lambda op, name: True)
    q = torch.zeros(1, 4, 2, 80, dtype=torch.bfloat16)
    assert _dispatch.choose("attention", OPERATOR.backends, "cuda", Problem(q, q, q)).name == "reference"
    (text,) = (record.getMessage() for record in logged)
    assert "cuda: takes a head_dim of 64, 96, 128, 256, alike for q and v, not 80 and 80" in text
    assert "triton: takes q and v of a head_dim of 64, 96, 128 or 256, not 80 and 80" in text


MARKED = {
    "a slice of the batch": lambda mask: mask[1:2],
    "a slice of all keys": lambda mask: mask[:, :, :, :12],
    "moved": lambda mask: mask.to(torch.device("cpu"), copy=True),
    "beams": lambda mask: mask.repeat_interleave(2, 0),
    "chosen rows": lambda mask: mask.index_select(0, torch.tensor([1, 0])),
    "detached": lambda mask: mask.detach().contiguous().clone(),
    "expanded": lambda mask: mask[:1].expand(3, -1, -1, -1),
    "copied": copy.deepcopy,
    "saved by autograd": lambda mask: Saved.of(mask),
}


class Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, mask):
        ctx.save_for_backward(mask)
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Saved.found = ctx.saved_tensors[0]
        return grad, None

    @staticmethod
    def of(mask):
        Saved.apply(torch.zeros(1, requires_grad=True), mask).backward()
        return Saved.found


@pytest.mark.parametrize("way", MARKED)
def test_what_models_do_to_a_mask_keeps_it_ours(way):
    function = masking_utils.causal_mask_function
    where = {"q_length": 12, "q_offset": 0} if V5 else {"cache_position": torch.arange(12)}
    mask = illada.mask_bounds(
        batch_size=2, kv_length=12, mask_function=function, attention_mask=padding("left").bool(), **where
    )
    changed = MARKED[way](mask)
    assert type(changed) is illada.MaskBounds
    x, module = torch.randn(len(changed), 2, 12, 8), torch.nn.Module()
    ranges = KeyRanges(changed.as_subclass(torch.Tensor)[:, 0].contiguous(), 12)
    right = torch.nn.functional.scaled_dot_product_attention(x, x, x, ranges.dense()[:, None]).nan_to_num()
    for found in (illada.attention_forward(module, x, x, x, changed)[0].transpose(1, 2), stand_in(x, x, x, changed)):
        torch.testing.assert_close(found, right)


def test_a_mask_that_a_model_computes_with_is_named():
    mask = illada.mask_bounds(batch_size=1, q_length=3, kv_length=3, cache_position=torch.arange(3))
    x = torch.randn(1, 1, 3, 8)
    for changed in (mask.float(), mask[:, :, None], mask[..., :2]):
        for call in (lambda m: illada.attention_forward(torch.nn.Module(), x, x, x, m), lambda m: stand_in(x, x, x, m)):
            with pytest.raises(ValueError, match="attention_mask: expected what the mask function returned"):
                call(changed)


@pytest.mark.parametrize("length", [1, 4, 9])
def test_doge_which_adds_its_own_scores_to_the_mask_is_refused_in_words(length):
    """Four keys have the shape of the bounds."""
    config = transformers.DogeConfig(**SIZES | {"num_hidden_layers": 1}, bos_token_id=1, eos_token_id=2)
    model = transformers.DogeForCausalLM(config).eval()
    model.set_attn_implementation("illada")
    with pytest.raises(
        ValueError, match=r'^attention_mask: .*: the model computes with its mask, use "sdpa" or "eager"'
    ):
        model(torch.ones(1, length, dtype=torch.int64))


def test_only_what_torch_says_of_shapes_and_values_is_said_of_the_mask():
    mask = illada.mask_bounds(batch_size=1, q_length=3, kv_length=3, cache_position=torch.arange(3))
    with pytest.raises(ValueError, match=r"^attention_mask: .* got add of it \(The size of tensor a"):
        mask + torch.zeros(7)
    with pytest.raises(NotImplementedError, match="no data"):
        mask.to("meta").cpu()


def test_a_model_is_one_graph():
    if not V5:
        pytest.skip("4.57 breaks graphs at its own masks")
    model, ids = build(DECODERS, "Llama")
    model.set_attn_implementation("illada")
    right = model(ids, use_cache=False).logits
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, right)
    for mask in (padding("left"), padding("right")):
        right = model(ids, attention_mask=mask, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits, right)
    holes = torch.tensor([[1, 0] * 6] * 2)
    with pytest.raises(RuntimeError, match="attention_mask: expected at most two runs of real tokens in a sequence"):
        compiled(ids, attention_mask=holes, use_cache=False)


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_dropout_and_changed_scores_are_refused():
    module, x = torch.nn.Module(), torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match="dropout_p: expected 0"):
        illada.attention_forward(module, x, x, x, None, dropout=0.1)
    with pytest.raises(ValueError, match="softcap: expected None"):
        illada.attention_forward(module, x, x, x, None, softcap=30.0)
    with pytest.raises(ValueError, match="s_aux: expected None"):
        illada.attention_forward(module, x, x, x, None, s_aux=torch.zeros(2))


@pytest.mark.parametrize("keys", [4, 5])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_an_integer_mask_of_the_users_own_is_refused_as_a_mask(keys, dtype):
    """Of four keys it has the shape and the dtype of bounds."""
    x = torch.randn(1, 1, keys, 8)
    mask = torch.ones(1, 1, keys, keys, dtype=dtype).tril()
    for call in (
        lambda: illada.attention_forward(torch.nn.Module(), x, x, x, mask),
        lambda: stand_in(x, x, x, mask),
        lambda: stand_in(x, x, x, mask[:, :, :1]),
    ):
        with pytest.raises(TypeError, match=r"attn_mask: expected torch\.bool or"):
            call()


def test_an_attention_function_without_its_mask_function_is_refused():
    """Else padding would vanish: transformers then gives no mask."""
    model, ids = build(DECODERS, "Llama")
    transformers.AttentionInterface.register("half", illada.attention_forward)
    model.set_attn_implementation("half")
    with pytest.raises(ValueError, match=r"attention_mask: got None from attn_implementation='half'"):
        model(ids, attention_mask=padding("left"))
    illada.register("half")
    assert_same = torch.testing.assert_close
    model.set_attn_implementation("illada")
    right = model(ids, attention_mask=padding("left")).logits
    model.set_attn_implementation("half")
    assert_same(model(ids, attention_mask=padding("left")).logits, right)


# ---- both versions ---------------------------------------------------------------------------------------------------
OF_TRAINER = (
    "test_loss_and_gradients_are_those_of_the_formula",
    "test_trainer_learns_and_evaluates",
    "test_the_denominator_is_that_of_the_whole_step_however_it_is_split",
)


@pytest.mark.skipif(not V5, reason="this is the older version")
@pytest.mark.skipif(not OLDER.exists(), reason="make test installs transformers 4.57 into build/")
def test_the_same_in_4_57():
    path = os.pathsep.join([str(OLDER), str(ROOT), os.environ.get("PYTHONPATH", "")])
    trainer = Path(__file__).with_name("test_trainer.py")
    files = [__file__, str(trainer.with_name("test_patch_transformers.py"))]
    files += [f"{trainer}::{name}" for name in OF_TRAINER]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist", *files]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED") and trainer.name in line]
    assert not skipped or importlib.util.find_spec("accelerate") is None, skipped
