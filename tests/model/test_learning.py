"""Training learns: a text is learned, the rate follows its schedule, and Muon does what it says."""

from __future__ import annotations

import pytest
import torch
from illada.config import ModelConfig
from illada.model import Model
from illada.training.config import TrainConfig
from illada.training.optim import optimizers, orthogonalize

from tests.helpers.training import trainer


@pytest.mark.parametrize("objective", ["full", "packed", "block"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_learns_a_repeated_text(objective, dtype):
    """27 bytes over and over: from log(258) = 5.6 nats a byte to below 2.5, the entropy of its letters being 2.6."""
    run = trainer(steps=125, objective=objective, dtype=dtype, batch_size=8, length=32)
    run.run()
    assert run.losses[0] > 4 and run.losses[-30:].mean() < 2.5
    assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())


def test_a_run_by_the_clock_ends_in_time_with_its_rate_at_zero():
    run = trainer(steps=None, seconds=1.0)
    seen = []
    assert run.run(lambda progress: seen.append((progress.done, run.optimizers[0].param_groups[0]["lr"])))
    assert 1.0 <= run.seconds < 5.0 and seen[-1][0] == 1.0
    assert seen[0][1] == 0 and max(rate for _, rate in seen) <= 0.02 and seen[-1][1] < 0.02 * 0.2


def test_the_rate_rises_for_the_warmup_and_falls_to_zero():
    config = TrainConfig(steps=1, warmup=0.1)
    assert [round(config.rate(done), 6) for done in (0, 0.05, 0.1, 0.55, 1, 1.1)] == [0, 0.5, 1, 0.5, 0, 0]
    assert TrainConfig(steps=1, warmup=0).rate(0) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "other"}, "objective: expected one of"),
        ({"steps": 5, "seconds": 1.0}, "expected one of them"),
        ({"steps": None}, "expected one of them"),
        ({"dtype": "float16"}, "dtype: expected"),
        ({"lr": -1.0}, "lr: expected a positive number"),
        ({"steps": 0}, "steps: expected a positive number"),
        ({"length": 18}, "multiple of the model's causal_block = 4"),
        ({"optimizer": "sgd"}, "optimizer: expected"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        trainer(**changes)


# ---- Muon ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 24), (48, 16), (16, 48), (3, 20, 30)])
def test_orthogonalize_keeps_directions_and_evens_out_singular_values(shape):
    """Singular values from 0.02 of the norm up land in 0.65 .. 1.25 (the quintic's range); U and V stay."""
    torch.manual_seed(0)
    u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.linspace(0.1, 1, u.shape[-1], dtype=torch.float64)
    found = orthogonalize(u @ torch.diag_embed(values.expand(u.shape[:-2] + values.shape)) @ vh)
    core = u.mT @ found @ vh.mT
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    assert 0.65 < diagonal.min() and diagonal.max() < 1.25
    assert (core - torch.diag_embed(diagonal)).abs().max() < 1e-6


def test_muon_updates_stacked_matrices_one_by_one_and_leaves_the_rest_to_adamw():
    config = ModelConfig.preset("demo", dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=48)
    torch.manual_seed(0)
    model = Model(config)
    muon, adamw = optimizers(model, "muon", 0.5, 0.25)
    of_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in of_muon) == (name.startswith("layers.") and parameter.dim() == 2), name
    assert sum(p.numel() for o in (muon, adamw) for g in o.param_groups for p in g["params"]) == sum(
        p.numel() for p in model.parameters()
    )
    layer = model.layers[0].qkv_proj.weight
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = layer.detach().clone()
    muon.step()
    gradient = (
        layer.grad * 0.05 * 0.95 + layer.grad * 0.05
    )  # the first momentum is 0.05 of it; Nesterov goes on by 0.95
    for rows in (slice(0, 32), slice(32, 48), slice(48, 64)):
        expected = orthogonalize(gradient[rows])  # at most as many rows as columns: scale 1
        torch.testing.assert_close(before[rows] - layer.detach()[rows], 0.5 * expected, rtol=1e-4, atol=1e-5)
