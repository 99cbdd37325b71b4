"""Cases and peers of a GPU, tested without one."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from illada.config import ModelConfig
from torch.nn.attention import SDPBackend

import illada_kernels as ik
from benchmarks import measure, run
from benchmarks.peers import attention as attention_peers
from benchmarks.peers import masked_loss as masked_loss_peers
from benchmarks.peers import unmask as unmask_peers
from benchmarks.peers.attention import DOCUMENTS, GpuCase
from benchmarks.suites import attention as attention_suite
from benchmarks.suites import generate as generate_suite
from benchmarks.suites import gpu_passes
from benchmarks.suites import layer as layer_suite
from benchmarks.suites import masked_loss as masked_loss_suite
from benchmarks.suites import unmask as unmask_suite
from illada_kernels.ops.attention import cases as shapes
from illada_kernels.ops.layer import cpu as cpu_layer
from illada_kernels.ops.unmask.cases import RANKED, TRUNCATIONS, Shape
from tests.helpers.unmask_oracle import truncated_set


# ---- cases ----------------------------------------------------------------------------------------------------------
def test_cases_of_a_gpu_are_listed_without_one():
    for op in ("attention_fwd", "attention_bwd", "masked_loss", "unmask"):
        cases = run.collect(op, "cuda")
        assert len({(case.name, case.dtype) for case in cases}) == len(cases) > 10
        assert all(case.facts["bytes"] > 0 for case in cases)
        assert any(case.facts.get("headline") for case in cases)


def test_attention_is_measured_at_16384_tokens_and_counts_the_pairs_that_are_attended():
    training, cached = attention_suite.gpu_shapes()
    assert sum(DOCUMENTS) == 16384 and min(DOCUMENTS) == 256 and max(DOCUMENTS) == 2048
    assert {shape.batch * shape.keys for shape in training} == {16384}
    facts = {case.name: case.facts for case in run.collect("attention_fwd", "cuda")}
    half, block = 4096, 32
    assert facts["block_diffusion_4k_b32_kv8"]["density"] == pytest.approx((half**2 + half * block) / (2 * half) ** 2)
    assert facts["packed_16k_kv32"]["density"] == pytest.approx(sum(n * n for n in DOCUMENTS) / 16384**2)
    assert facts["full_4k_kv8"]["flops"] == pytest.approx(4 * 4 * 4096**2 * 32 * 128)
    asked = {(s.batch, s.queries, s.keys, s.kv_heads) for s in cached}
    assert asked == {(b, q, k, h) for b in (1, 16) for q in (32, 64) for k in (1024, 4096, 16384) for h in (8, 32)}


@pytest.mark.parametrize(("kind", "block"), [("block_diffusion", 4), ("block_diffusion", 16), ("packed", 0)])
def test_flex_attention_is_given_the_mask_that_we_have(kind, block, monkeypatch):
    monkeypatch.setattr(attention_peers, "DOCUMENTS", (16, 40, 8))
    case = GpuCase("x", 1, 64, 64, 2, 2, 16, attention_suite._gpu_mask, kind=kind, block=block)
    mod = attention_peers.mask_mod(case, "cpu")
    row = torch.arange(64)
    assert torch.equal(mod(0, 0, row[:, None], row[None, :]), case.key_ranges("cpu").dense()[0])
    additive = attention_peers.additive_mask(case, torch.float32, torch.device("cpu"))
    assert torch.equal(additive[0, 0] == 0, case.key_ranges("cpu").dense()[0])


# ---- peers do the same job ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["full", "block_diffusion", "packed", "cached"])
@pytest.mark.parametrize("direction", ["forward", "backward", "forward+backward"])
def test_peers_of_attention_give_what_ours_gives(kind, direction, monkeypatch):
    monkeypatch.setattr(attention_peers, "DOCUMENTS", (16, 40, 8))
    rows = 8 if kind == "cached" else 64
    case = GpuCase("x", 1, rows, 64, 4, 2, 16, attention_suite._gpu_mask, kind=kind, block=4)
    work = attention_suite.build_on_gpu(case, direction, torch.float32, "cpu")
    name = "math" if kind in ("full", "cached") else "math, dense mask"
    ours, theirs = next(iter(work.ours.values()))(), work.peers[name]()
    pairs = [(ours, theirs)] if direction == "forward" else list(zip(ours, theirs))
    for mine, other in pairs:  # theirs has its heads first
        torch.testing.assert_close(mine, other.transpose(1, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="No viable backend"):
        work.peers[name.replace("math", "cudnn")]()


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd"])
@pytest.mark.parametrize("mask", [shapes._block_diffusion, shapes._padding, lambda case, device: None])
def test_peers_of_attention_on_a_cpu_give_what_ours_gives(op, mask, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = shapes.Case("x", 2, 128, 128, 4, 2, 16, mask)
    work = attention_suite.build(case, op, torch.float32, "cpu")
    assert (attention_suite.FLEX in work.peers) == (op == "attention_fwd") == (attention_suite.FLEX not in work.absent)
    ours = next(iter(work.ours.values()))
    for peer in work.peers.values():
        mine, other = ours(), peer()
        if op == "attention_fwd":
            torch.testing.assert_close(mine, other.transpose(1, 2), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(mine[0], other[0].transpose(1, 2), rtol=1e-4, atol=1e-5)
        ours(), peer()  # both on to the first set of inputs again


@pytest.mark.parametrize("kind", ["full", "block_diffusion", "packed", "cached"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
def test_a_kernel_that_is_wrong_at_the_size_measured_is_told(kind, direction, monkeypatch):
    monkeypatch.setattr(attention_peers, "DOCUMENTS", (80, 100, 20))
    case = GpuCase("x", 2, 8 if kind == "cached" else 200, 200, 4, 2, 16, attention_suite._gpu_mask, kind=kind, block=4)
    case = dataclasses.replace(case, batch=1) if kind == "packed" else case
    work = attention_suite.build_on_gpu(case, direction, torch.float32, "cpu")
    name = next(iter(work.ours))
    assert 0 < work.check(name) < 1e-5
    right = ik.attention

    for factor in (2, torch.nan):  # in the last row

        def off(*arguments, factor=factor, **options):
            out = right(*arguments, **options)
            return torch.cat([out[:, :-1], factor * out[:, -1:]], dim=1)

        monkeypatch.setattr(ik, "attention", off)
        assert not work.check(name) <= measure.WRONG
    assert "WRONG" in run.wrong({"error": 0.3}) and "WRONG" in run.wrong({"error": float("nan")})
    assert not run.wrong({"error": 0.004}) and not run.wrong({})


@pytest.mark.parametrize("kind", ["full", "block_diffusion"])
def test_flex_attention_is_called_as_it_wants_to_be(kind, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    case = GpuCase("x", 1, 256, 256, 4, 2, 16, attention_suite._gpu_mask, kind=kind, block=4, flex=True)
    work = attention_suite.build_on_gpu(case, "forward", torch.float32, "cpu")
    assert "block mask" in work.notes["flex, compiled"]
    theirs = work.peers["flex, compiled"]().transpose(1, 2)
    torch.testing.assert_close(next(iter(work.ours.values()))(), theirs, rtol=1e-4, atol=1e-5)


def test_key_heads_are_repeated_for_a_backend_that_takes_no_groups():
    found, x = attention_peers.Peers(), torch.randn(1, 8, 4, 16)
    layout, _ = attention_peers.with_groups(
        found, "efficient", SDPBackend.EFFICIENT_ATTENTION, None, x, x[:, :, :2], x[:, :, :2]
    )
    assert layout(x[:, :, :2]).shape == (1, 4, 8, 16) and "repeated" in found.notes["efficient"]


@pytest.mark.parametrize("gradients", [True, False])
def test_peers_of_masked_loss_give_what_ours_gives(gradients, monkeypatch):
    monkeypatch.delitem(masked_loss_peers.MAKERS, "F.cross_entropy, compiled")
    case = masked_loss_suite.GpuCase("x", 48, 20, 16, 129, gradients=gradients)
    work = masked_loss_suite.build_on_gpu(case, torch.float32, "cpu")
    ours = next(iter(work.ours.values()))()
    weighted = {name: job for name, job in work.peers.items() if "unweighted" not in name}
    assert len(weighted) >= 3
    for name, job in weighted.items():
        mine, theirs = (ours[1], job()[1]) if gradients else (ours, job())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3, msg=name)
        if gradients and "all rows" in name:
            torch.testing.assert_close(ours[0], job()[0], rtol=1e-4, atol=1e-3, msg=name)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_loss_that_is_wrong_is_told(gradients, monkeypatch):
    monkeypatch.setattr(masked_loss_peers, "MAKERS", {})
    case = masked_loss_suite.GpuCase("x", 90, 40, 16, 129, gradients=gradients)
    work = masked_loss_suite.build_on_gpu(case, torch.float32, "cpu")
    name, right = next(iter(work.ours)), masked_loss_suite.masked_loss
    assert work.check(name) < 1e-4
    monkeypatch.setattr(masked_loss_suite, "masked_loss", lambda *a, **options: 1.1 * right(*a, **options))
    assert work.check(name) == pytest.approx(0.1, rel=0.01)

    def leaks(hidden, *a, **options):
        return right(hidden, *a, **options) + (hidden.sum() if gradients else torch.nan)

    monkeypatch.setattr(masked_loss_suite, "masked_loss", leaks)
    assert not work.check(name) <= measure.WRONG


def test_a_proposal_that_is_wrong_is_told():
    work = unmask_suite.on_gpu(Shape("s", 3, 5, 33, 16, 32), 0.0, "step", "cpu")
    assert work.check(next(iter(work.ours))) < 1e-5
    hidden, weight = torch.randn(2, 3, 8), torch.randn(20, 8)
    best = (hidden @ weight.T)[..., :19].argmax(-1)
    assert unmask_suite.error_of(best, hidden, weight, 19) < 1e-5
    assert unmask_suite.error_of((best + 1) % 19, hidden, weight, 19) > 0.1
    best[1, 1] = -1
    assert unmask_suite.error_of(best, hidden, weight, 19) == float("inf")


@pytest.mark.parametrize("name", layer_suite.FUNCTIONS)
def test_a_layer_that_is_wrong_is_told_and_its_peers_give_what_ours_gives(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr(layer_suite, "sets_beyond_cache", lambda *_: 1)  # so that the peers meet the same inputs
    work = layer_suite.build(name, 1, 5, "float32", "cpu")
    backend = next(iter(work.ours))
    assert work.check(backend) < 1e-5
    ours = work.ours[backend]()
    for peer in work.peers.values():
        for mine, theirs in zip(ours, peer()):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    entry = {"norm": "norm", "rope": "rope", "swiglu": "swiglu", "layer": "rope"}[name]
    right = getattr(cpu_layer, entry)

    def off(*arguments):
        out = right(*arguments)
        return tuple(1.1 * x for x in out) if isinstance(out, tuple) else 1.1 * out

    monkeypatch.setattr(cpu_layer, entry, off)
    assert work.check(backend) > measure.WRONG


# ---- the model ------------------------------------------------------------------------------------------------------
TINY = {"dim": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 96, "vocab_size": 1100}
TINY |= {"mask_id": 5, "eos_id": 2, "pad_id": 1}


def test_decoding_on_a_gpu_has_every_batch_and_number_of_tokens_a_pass():
    names = [case.name for case in run.collect("generate", "cuda")]
    assert len(set(names)) == len(names)
    for batch in (1, 8, 32):
        long = [name for name in names if f", {batch} x (512 + 256)" in name]
        assert sorted(name.split(", ")[-1] for name in long if "iLLaDA" in name) == [f"{n} a pass" for n in (1, 2, 4)]
        assert sum("Qwen2.5" in name for name in long) == 1
        passes = [name for name in names if name.startswith(f"one cached pass, iLLaDA-8B, {batch} x 32 rows")]
        assert [name.endswith("FP8 linears") for name in passes] == [False, True]
    assert "iLLaDA-8B, 1 x (512 + 32), block 32, cache dual" in names


@pytest.mark.parametrize("per_pass", [1, 2, 4])
def test_the_loop_beside_decoding_writes_its_tokens_with_as_many_a_pass(per_pass):
    config = ModelConfig.preset("LLaDA-8B", **TINY)
    work = generate_suite.build(config, 2, 7, 8, 8, "none", "cpu", "float32", per_pass)
    ours, theirs = work.ours["default"](), work.peers["LLaDA's loop"]()
    assert ours.forward_passes == -(-8 // per_pass) and ours.tokens == theirs.tolist()
    flops = [generate_suite.needed(config, 2, 7, 8, 8, "none", 4, per_pass=n)[0] for n in (per_pass, 8)]
    assert flops[0] > flops[1] and work.flops == flops[0]


def test_the_passes_beside_an_autoregressive_generation_write_its_tokens(monkeypatch):
    monkeypatch.setattr(generate_suite, "transformers_generate", lambda *_: None)
    config = ModelConfig.preset("Qwen2.5-7B", **TINY)
    work = generate_suite.build(config, 2, 7, 8, 1, "block_causal", "cpu", "float32")
    assert work.ours["default"]().tokens == work.beside["its passes alone"]().tolist()


def test_a_loop_that_would_take_minutes_is_left_out_with_the_reason(monkeypatch):
    monkeypatch.setattr(generate_suite, "LONG", 1.0)
    work = generate_suite.build(ModelConfig.preset("LLaDA-8B", **TINY), 1, 7, 8, 8, "dual", "cpu", "float32", 1)
    assert not work.peers and "PFLOP" in work.absent["LLaDA's loop"]


@pytest.mark.parametrize("fp8", [False, True])
def test_a_cached_pass_is_measured_beside_a_look_at_its_weights(fp8, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    config = ModelConfig.preset("iLLaDA-8B", **TINY)
    work = gpu_passes.build(config, 3, 4, 12, fp8, "cpu", "bfloat16")
    assert work.ours["default"]().shape == (3, 4, 64) and len(work.beside["weights read once"]()) == 2 * 4
    body = 2 * (64 * (4 + 2 * 2) * 16 + 64 * 64 + 3 * 64 * 96)
    assert work.flops == 2 * body * 12 + 4 * 2 * 3 * 4 * 12 * 64
    assert work.bytes == body * (1 if fp8 else 2) + 2 * 2 * 3 * 12 * 32 * 2
    if fp8:  # e4m3 has 3 bits after the leading one: rounded by 2% in the mean, weights and rows, in four products
        error = float(re.search(r"by ([\d.]+)%", work.notes["default"])[1])
        assert 0.5 < error < 10


def test_fp8_linears_round_each_row_by_its_own_scale():
    linear = torch.nn.Linear(32, 16, bias=True).bfloat16()
    linear.weight.data[3] *= 1e-3
    x = torch.randn(2, 5, 32).bfloat16()
    x[1, 2] *= 1e3
    ours = gpu_passes.Fp8Linear(linear, gpu_passes.rounded)(x)
    exact = torch.nn.functional.linear(x.float(), linear.weight.float(), linear.bias.float())
    scale = x.float().norm(dim=-1, keepdim=True) * linear.weight.float().norm(dim=-1)
    assert (
        (ours.float() - exact).abs() / (scale + exact.abs())
    ).max() < 0.06  # 2^-4 for each of both, of which few add up


def test_rows_that_pad_a_peer_change_nothing():
    hidden, head = torch.randn(5, 8, requires_grad=True), torch.randn(17, 8, requires_grad=True)
    rows = masked_loss_peers.Rows(hidden, head, torch.arange(5), torch.rand(5))
    padded = rows.padded(8)
    assert padded.hidden.shape == (8, 8) and padded.hidden.is_leaf
    torch.testing.assert_close(masked_loss_peers.plain(padded), masked_loss_peers.plain(rows))


def test_steps_of_peers_commit_the_same_tokens():
    logits = torch.randn(3, 6, 40)
    written = []
    for step in (unmask_peers.llada_step, unmask_peers.float32_step, unmask_peers.device_step):
        tokens = torch.full((3, 6), 39)
        tokens[1, 2] = 7
        written.append(step(logits, tokens, 2, 39, 0.0))
    assert torch.equal(written[0], written[1]) and torch.equal(written[0], written[2])
    assert int((written[0] != 39).sum()) == 7 and written[0][1, 2] == 7


@pytest.mark.parametrize("kind", ["step", "entropy", "renoise", "loop", "top_k50", "top_k_top_p_min_p"])
def test_every_kind_of_unmask_case_runs(kind, monkeypatch):
    monkeypatch.setattr(unmask_peers, "gpu_limits", lambda: {"memory": 2 * 2 * 40 * 5 * 33, "l2": 0})
    work = unmask_suite.on_gpu(Shape("s", 3, 5, 33, 16, 32), 1.0, kind, "cpu")
    for job in {**work.ours, **work.peers}.values():
        job()
    assert kind != "loop" or "2 sequences at a time" in work.notes["LLaDA's loop"]
    job = next(iter(unmask_suite.selection(2, 9, "cpu").ours.values()))
    assert job().committed.sum(-1).tolist() == [4, 4]


@pytest.mark.parametrize("kind", ["logits", "hidden"])
@pytest.mark.parametrize("name", [*TRUNCATIONS, *RANKED, "at_least", "renoise"])
def test_every_option_of_unmask_has_a_case_that_runs_beside_the_row_without(kind, name):
    work = unmask_suite.with_option(kind, Shape("s", 2, 5, 2100, 16, 32), torch.float32, name, "cpu")
    for job in {**work.ours, **work.peers, **work.beside}.values():
        job()
    assert [f"{b} without" for b in work.ours] == list(work.beside)


def test_the_peers_keep_what_unmask_keeps():
    logits = torch.randn(1, 50, 300, generator=torch.Generator().manual_seed(1)) * 2
    for options in ({"top_k": 7}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 30, "top_p": 0.9, "min_p": 0.05}):
        kept = unmask_peers.truncated(logits, 0.7, **options) > -torch.inf
        for row, ids in zip(logits[0], kept[0]):
            assert set(ids.nonzero()[:, 0].tolist()) == truncated_set(row, 0.7, **options)
