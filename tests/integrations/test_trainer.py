"""The loss in transformers' Trainer and in plain loops: LLaDA's formula on any model with an LM head."""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers", reason="no transformers")

from illada_kernels.integrations import trainer as ours  # noqa: E402
from illada_kernels.integrations.trainer import MaskedDiffusion, MaskingCollator, compute_loss  # noqa: E402

ROOT = Path(__file__).parents[2]
MASK, PAD, VOCAB = 98, 0, 99
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SIZES |= {"vocab_size": VOCAB, "max_position_embeddings": 64, "pad_token_id": PAD}
NO_DROPOUT = {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
KINDS = {
    "Llama, no bias": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "Bert, bias, tied": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **NO_DROPOUT)),
    "Gemma2, softcap": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=2, final_logit_softcapping=0.5)
    ),
}


def features(lengths=(7, 3, 12)):
    drawn = torch.Generator().manual_seed(1)
    return [{"input_ids": torch.randint(1, MASK, (n,), generator=drawn).tolist()} for n in lengths]


def batch_of(*arguments, **options):
    return MaskingCollator(MASK, PAD, generator=torch.Generator().manual_seed(2), **options)(features(*arguments))


# ---- the collator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_what_is_masked_is_what_has_a_weight_and_padding_never_is(side):
    batch = batch_of(padding_side=side)
    real = batch["attention_mask"].bool()
    assert real.sum(1).tolist() == [7, 3, 12] and bool(real[:, 0 if side == "right" else -1].all())
    masked = batch["input_ids"] == MASK
    assert torch.equal(masked, batch["loss_weight"] > 0) and masked.any() and not (masked & ~real).any()
    assert torch.equal(batch["labels"] != ours.IGNORED, real)
    kept = real & ~masked
    assert torch.equal(batch["input_ids"][kept], batch["labels"][kept])


def test_prompts_are_never_masked():
    rows = [{"input_ids": [5] * 40, "labels": [-100] * 20 + [5] * 20} for _ in range(8)]
    batch = MaskingCollator(MASK, PAD)(rows)
    assert (batch["input_ids"][:, :20] == 5).all() and (batch["labels"][:, :20] == -100).all()
    assert (batch["input_ids"][:, 20:] == MASK).any()


def test_the_weight_is_one_over_the_rate_so_that_its_mean_is_one():
    batch = MaskingCollator(MASK, PAD, eps=0.05)([{"input_ids": [5] * 4000}] * 64)
    rate = (batch["input_ids"] == MASK).float().mean(1)
    assert rate.min() < 0.2 and rate.max() > 0.8
    # a row's mean weight has variance (1 - p) / (4000 p) <= 1 / 200
    assert (batch["loss_weight"].mean(1) - 1).abs().max() < 5 * 200**-0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mask_id": 3, "pad_id": 3}, "pad_id: expected an id other than mask_id"),
        ({"mask_id": 3, "pad_id": 0, "eps": 0.0}, "eps: expected a number in"),
        ({"mask_id": 3, "pad_id": 0, "padding_side": "top"}, "padding_side: expected"),
        ({"mask_id": 3, "pad_id": 0, "eps": "small"}, "eps: expected a number, got str"),
        ({"mask_id": -1, "pad_id": 0}, "mask_id: expected an int from 0 to 2147483647, got -1"),
        ({"mask_id": None, "pad_id": 0}, "mask_id: expected an int, got NoneType"),
        ({"mask_id": 3, "pad_id": -100}, "pad_id: expected an int from 0 to 2147483647, got -100"),
        ({"mask_id": 3, "pad_id": 0, "generator": 7}, r"generator: expected a torch\.Generator or None, got int"),
    ],
)
def test_settings_that_cannot_be(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        MaskingCollator(**arguments)


@pytest.mark.parametrize(
    "features, message",
    [
        ([], "features: expected a list of {'input_ids': tokens}, got none"),
        ([None], "features: expected a list of .* got NoneType"),
        ([{"labels": [1]}], "features: expected the key 'input_ids', got"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "features: expected the same keys in each"),
        ([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [1, 2], "labels": [1]}], "labels: .* 2, got 1"),
        ([{"input_ids": [1.5, 2]}], r"input_ids: expected a list of integers, got torch\.float32"),
        ([{"input_ids": [[1, 2]]}], r"input_ids: expected a list of integers, got .* of shape \(1, 2\)"),
    ],
)
def test_features_that_cannot_be(features, message):
    with pytest.raises(ValueError, match=message):
        MaskingCollator(MASK, PAD)(features)


def test_columns_that_would_be_lost_are_refused():
    with pytest.raises(ValueError, match="got 'prompt_length'"):
        MaskingCollator(MASK, PAD)([{"input_ids": [1], "prompt_length": 1}])


# ---- the loss -------------------------------------------------------------------------------------------------------


def plain(model, batch, shifted=False):
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
    labels, weight = batch["labels"], batch["loss_weight"]
    if shifted:
        logits, labels, weight = logits[:, :-1], labels[:, 1:], weight[:, 1:]
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return (each * weight).sum() / (batch["labels"] != -100).sum()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_formula(kind, shifted):
    model, batch = KINDS[kind]().eval(), batch_of()
    losses, gradients = [], []
    for loss in (plain(model, batch, shifted), compute_loss(model, batch, shifted=shifted)):
        model.zero_grad()
        loss.backward()
        losses.append(loss.detach())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    loss, outputs = compute_loss(model, batch, return_outputs=True, shifted=shifted)
    torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=0)
    assert outputs.logits.shape == (*batch["input_ids"].shape, VOCAB)


def test_options_reach_the_loss_and_the_head_is_as_it_was():
    model, batch = KINDS["Llama, no bias"](), batch_of()
    assert compute_loss(model, batch, forbid=(MASK,)) < compute_loss(model, batch)
    with pytest.raises(ValueError, match="label_smoothing: expected"):
        compute_loss(model, batch, label_smoothing=2.0)
    assert "forward" not in vars(model.lm_head)


def test_a_wrapped_model_gives_the_same():
    class Wrapper(torch.nn.Module):  # as DistributedDataParallel
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, **inputs):
            return self.module(**inputs)

    model, batch = KINDS["Llama, no bias"](), batch_of()
    assert torch.equal(compute_loss(Wrapper(model), batch), compute_loss(model, batch))


def test_what_cannot_be_fused_is_named():
    batch = batch_of()
    with pytest.raises(TypeError, match=r"Linear\.get_output_embeddings\(\) to give the LM head"):
        compute_loss(torch.nn.Linear(3, 3), batch)
    with pytest.raises(ValueError, match=r"expected 'loss_weight'.*MaskingCollator"):
        compute_loss(torch.nn.Linear(3, 3), {"labels": batch["labels"]})

    class NeverCalled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(4, VOCAB)

        def get_output_embeddings(self):
            return self.head

        def forward(self, **inputs):
            return inputs

    scaled = transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.25))
    with pytest.raises(ValueError, match="CohereForCausalLM changes them"):
        compute_loss(scaled, batch)
    compute_loss(scaled, batch, return_outputs=True)[0].backward()
    with pytest.raises(ValueError, match="NeverCalled's forward to call its head once, it called it 0 times"):
        compute_loss(NeverCalled(), batch)


# ---- transformers' Trainer ------------------------------------------------------------------------------------------


def make_trainer(folder, model, data, **options):
    class DiffusionTrainer(MaskedDiffusion, transformers.Trainer):
        pass

    collator = options.pop("data_collator", MaskingCollator(MASK, PAD))
    fixed = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "seed": 0}
    arguments = transformers.TrainingArguments(str(folder), **fixed, **options)
    return DiffusionTrainer(model, arguments, train_dataset=data, eval_dataset=data, data_collator=collator)


def one_step(folder, size, steps):
    """How one SGD step on four rows of unequal lengths, masked already, changes a model; float32 (parameters,)."""
    torch.manual_seed(5)
    model, batch = KINDS["Llama, no bias"](), batch_of((12, 3, 7, 9))
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    rows = [{key: value[i] for key, value in batch.items()} for i in range(4)]
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 1}
    options |= {"data_collator": transformers.default_data_collator, "remove_unused_columns": False}
    make_trainer(folder, model, rows, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **options).train()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.fixture
def trainer(tmp_path):
    pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")
    return functools.partial(make_trainer, tmp_path)


def test_trainer_learns_and_evaluates(trainer):
    model = KINDS["Bert, bias, tied"]()
    data = [{"input_ids": [5, 6, 7, 8, 9, 10]}, {"input_ids": [20, 21, 22, 23]}] * 16
    options = {"max_steps": 60, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "logging_steps": 60}
    run = trainer(model, data, **options)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before / 3


def test_the_denominator_is_that_of_the_whole_step_however_it_is_split(trainer, tmp_path):
    whole = one_step(tmp_path, 4, 1)
    for size, steps in ((1, 4), (2, 2)):
        assert (one_step(tmp_path, size, steps) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_two_ranks_step_as_one(trainer, tmp_path, python):
    """DistributedDataParallel, two rows a rank."""
    done = python(__file__, str(tmp_path), cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = one_step(tmp_path, 4, 1)
    assert (torch.load(tmp_path / "moved.pt") - whole).abs().max() < 1e-5 * whole.abs().max()


def step_as_rank(rank: int, port: int, folder: str) -> None:
    world = {"WORLD_SIZE": 2, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in world.items()})  # as torchrun does
    moved = one_step(folder, 2, 1)
    assert torch.distributed.get_world_size() == 2
    if rank == 0:
        torch.save(moved, Path(folder) / "moved.pt")
    torch.distributed.destroy_process_group()  # a rank that ends with threads of gloo may abort


if __name__ == "__main__":  # both ranks of test_two_ranks_step_as_one, forked because importing outlasts a step
    assert transformers.Trainer  # imported before
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=step_as_rank, args=(rank, port, sys.argv[1])) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    sys.exit(any(rank.exitcode for rank in ranks))
