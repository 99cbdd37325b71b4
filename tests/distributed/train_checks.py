"""What every rank checks of training over ranks; test_train.py runs it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import itertools
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from illada import Model, ModelConfig
from illada.errors import CheckpointError, CheckpointIOError
from illada.training import lora, objectives
from illada.training.config import TrainConfig
from illada.training.objectives import Example
from illada.training.parallel.layout import Layout, Ranks
from illada.training.parallel.model import ShardedModel, whole
from illada.training.parallel.share import Share
from illada.training.parallel.state import tensors_of
from illada.training.parallel.trainer import ParallelTrainer
from illada.training.parallel.watch import Watch
from illada.training.trainer import Trainer
from torch.distributed.checkpoint import FileSystemWriter

from illada_kernels import TopK, distributed, unmask
from tests.helpers import ranks
from tests.helpers.checkout import ROOT
from tests.helpers.ranks import worlds

EPS = torch.finfo(torch.float32).eps
PEFT = ROOT / "build" / "peft"
SMALL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "ffn_dim": 48,
    "vocab_size": 67,
    "mask_id": 66,
    "eos_id": 65,
    "pad_id": 64,
    "max_seq_len": 128,
    "init_std": 0.2,
}
LAYOUTS = {2: [(1, 1, 2), (1, 2, 1), (2, 1, 1)], 4: [(2, 1, 2), (1, 2, 2)]}  # data, context, tensor


def prepare() -> None:
    """Imports what ranks would import at their first steps and graphs."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    torch._dynamo.reset()
    if PEFT.exists():
        sys.path.insert(0, str(PEFT))
        importlib.import_module("peft")


def layouts() -> list[Layout]:
    return [Layout(*sizes) for sizes in LAYOUTS[dist.get_world_size()]]


def tokens(batch: int = 4, length: int = 21) -> torch.Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(5))


def examples() -> dict[str, Example]:
    g = torch.Generator().manual_seed(7)
    documents, lengths = objectives.split_windows(4, 21, 0.7, g), torch.tensor([21, 20, 9, 21])
    return {
        "full": objectives.full_sequence(tokens(), SMALL["mask_id"], g),
        "packed": objectives.packed(tokens(), SMALL["mask_id"], g, documents=documents),
        "block": objectives.block_diffusion(tokens(length=20), SMALL["mask_id"], g, block=4),
        "trajectory": objectives.trajectory(
            tokens(),
            torch.rand(4, 21, generator=g).argsort(1).where(torch.arange(21) < lengths[:, None], 0),
            SMALL["mask_id"],
            g,
            lengths=lengths,
        ),
    }


def kinds() -> dict[str, ModelConfig]:
    return {
        "tied": ModelConfig(**SMALL, tie_embeddings=True),
        "untied, qk norm, bias": ModelConfig(**SMALL, qk_norm=True, qkv_bias=True),
        "shifted, blocks": ModelConfig(**SMALL, shifted_logits=True, causal_block=4),
    }


def alone(config: ModelConfig, example: Example) -> tuple[float, dict[str, torch.Tensor]]:
    torch.manual_seed(3)
    model = Model(config)
    loss = example.loss(model)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def check_losses_and_gradients_are_those_of_one_process() -> None:
    """In each layout; gradients within 64 float32 roundings of the largest of a weight."""
    device = torch.device("cpu")
    for layout in layouts():
        place = Ranks.connect(layout, device)
        for (kind, config), (name, example) in zip(itertools.cycle(kinds().items()), examples().items()):
            model = ShardedModel(config, place)
            model.draw(3)
            right, grads = alone(config, example)
            part = example.split(layout.data)[place.data]
            loss = model(Share.of(part, config, layout.context, place.context))
            loss.backward()
            said = (layout, kind, name)
            assert abs(place.total(loss.detach()).item() - right) <= 20 * EPS * abs(right), said
            for weight, rows in model.places().items():
                mine = torch.cat([whole(p.grad) for _, p in rows])
                bound = 64 * EPS * float(grads[weight].abs().max())
                assert (mine - grads[weight]).abs().max() <= bound, (*said, weight)


@worlds(2)
def check_weights_are_those_of_one_process() -> None:
    for layout in layouts():
        place = Ranks.connect(layout, torch.device("cpu"))
        for config in kinds().values():
            model = ShardedModel(config, place)
            model.draw(3)
            torch.manual_seed(3)
            right = dict(Model(config).named_parameters())
            assert all(torch.equal(weight, right[name]) for name, weight in model.gathered())


def raised(call: Any) -> str:
    try:
        call()
    except Exception as error:
        return str(error)
    return ""


def check_layouts_that_do_not_divide_are_refused() -> None:
    config, world = ModelConfig(**SMALL), dist.get_world_size()
    train = TrainConfig(steps=1, batch_size=6, length=8)

    def said(tensor: int = 1, context: int = 1, **changed: Any) -> str:
        try:
            Layout.of(changed.pop("world", world), tensor, context, config, TrainConfig(**{**vars(train), **changed}))
        except ValueError as error:
            return str(error)
        return ""

    assert "world size: expected a multiple of tensor_parallel * context_parallel = 3" in said(tensor=3)
    assert "tensor_parallel: expected a divisor of the model's 2 key heads, got 4" in said(tensor=4, world=4)
    assert "batch_size: expected a multiple of the 4 data-parallel ranks, got 6" in said(world=4)
    assert "accumulate: expected at most the 3 sequences of a rank, got 4" in said(world=2, accumulate=4)
    assert "context_parallel: expected at least 1 rank, got 0" in said(context=0)
    assert "lora: expected tensor_parallel 1, because" in said(tensor=2, world=2, lora=2, optimizer="adamw")
    assert said(context=world, lora=2, optimizer="adamw") == said(tensor=2, context=world // 2) == ""


def check_generated_tokens_are_those_of_one_process() -> None:
    """Six passes of a block of masks behind a prompt, with noise, the head and the layers over two ranks."""
    config = kinds()["untied, qk norm, bias"]
    model = ShardedModel(config, Ranks.connect(Layout(dist.get_world_size() // 2, 1, 2), torch.device("cpu")))
    model.draw(3)
    torch.manual_seed(3)
    one = Model(config)
    shown = torch.cat([tokens(2, 5), torch.full((2, 12), config.mask_id)], 1)
    positions = torch.arange(5, 17).expand(2, -1)
    call: dict[str, Any] = {"mask_id": config.mask_id, "temperature": 0.8, "seed": 11}
    mine, right = shown.clone(), shown.clone()
    with torch.no_grad():
        for step in range(6):
            hidden = model.hidden(mine)[:, 5:]
            head, vocab = model.head()
            distributed.unmask(hidden, head, mine, positions, TopK(2), step=step, **vocab, **call)
            unmask(one(right)[:, 5:], one.head_weight, right, positions, TopK(2), step=step, **call)
    assert torch.equal(mine, right) and (mine != config.mask_id).all()


# ---- the trainer ----------------------------------------------------------------------------------------------------


class Batches:
    def batch(self, step: int) -> np.ndarray:
        return np.random.default_rng(step).integers(0, 64, (4, 20))


def train_config(**changed: Any) -> TrainConfig:
    settings = {"steps": 4, "batch_size": 4, "length": 20, "lr": 0.01, "adamw_lr": 0.01, "optimizer": "adamw"}
    return TrainConfig(**{**settings, **changed})


def model_config(config: TrainConfig) -> ModelConfig:
    return ModelConfig(**SMALL, tie_embeddings=True, causal_block=4 * (config.objective == "block"))


def losses_alone(config: TrainConfig) -> list[float]:
    """Returns what one process computes, which is rank 0; the others wait for it and leave it their cores."""
    torch.manual_seed(3)
    said: list[Any] = [None]
    if dist.get_rank() == 0:
        trainer = Trainer(Model(model_config(config)), Batches(), config)
        trainer.run()
        said = [trainer.losses.tolist()]
    dist.broadcast_object_list(said)
    return said[0]


def parallel(layout: Layout, config: TrainConfig, folder: Path | None = None, identity: str = "x") -> ParallelTrainer:
    model = ShardedModel(model_config(config), Ranks.connect(layout, torch.device("cpu")))
    model.draw(3)
    return ParallelTrainer(model, Batches(), config, folder, identity)


def near(mine: list[float], right: list[float]) -> bool:
    """Losses of four steps, of which each makes a rounding larger: AdamW divides by a gradient's own size."""
    return len(mine) == len(right) and max(abs(a - b) for a, b in zip(mine, right)) < 2e-4


def check_steps_are_those_of_one_process() -> None:
    configs = (
        train_config(objective="block", accumulate=2 if dist.get_world_size() == 2 else 1),
        train_config(objective="packed", optimizer="muon", clip=0.1, weight_decay=0.1),
    )
    for config in configs:
        right = losses_alone(config)
        for layout in layouts():
            if layout.data * config.accumulate <= 4:
                trainer = parallel(layout, config)
                assert trainer.run()
                assert near(trainer.losses.tolist(), right), (layout, config, trainer.losses, right)


@worlds(2)
def check_held_out_losses_are_those_of_one_process() -> None:
    config = train_config(steps=2, eval_every=1)
    said: list[Any] = []
    if dist.get_rank() == 0:
        torch.manual_seed(3)
        Trainer(Model(model_config(config)), Batches(), config, held_out=Batches()).run(
            lambda progress: said.append(progress.held_out)
        )
    for layout in layouts():
        model = ShardedModel(model_config(config), Ranks.connect(layout, torch.device("cpu")))
        model.draw(3)
        mine: list[Any] = []
        ParallelTrainer(model, Batches(), config, held_out=Batches()).run(lambda p, m=mine: m.append(p.held_out))
        assert dist.get_rank() > 0 or near(mine, said), (layout, mine, said)


@worlds(2)
def check_loader_processes_change_nothing() -> None:
    config = train_config(objective="block")
    for layout in layouts():
        model = ShardedModel(model_config(config), Ranks.connect(layout, torch.device("cpu")))
        model.draw(3)
        ahead = ParallelTrainer(model, Batches(), config, workers=1)
        assert ahead.run() and ahead.losses.tolist() == _run(layout, config), layout


def _run(layout: Layout, config: TrainConfig) -> list[float]:
    trainer = parallel(layout, config)
    assert trainer.run()
    return trainer.losses.tolist()


@worlds(2)
def check_compiled_layers_train_as_others_where_the_batch_alone_is_shared() -> None:
    """Dynamo's graphs run by eager kernels, because inductor's take a minute to compile."""
    plain, compiled = train_config(objective="block"), train_config(objective="block", compile=True)
    with pytest.MonkeyPatch.context() as patch:
        graphs: list[Any] = []
        patch.setattr(
            torch, "compile", lambda f, make=torch.compile: graphs.append(f) or make(f, backend="eager", fullgraph=True)
        )
        assert near(_run(Layout(2, 1, 1), compiled), _run(Layout(2, 1, 1), plain))
        assert len(graphs) == SMALL["n_layers"]
    for layout, config, message in (
        (Layout(1, 1, 2), compiled, "compile: expected layers that lie whole on a rank"),
        (Layout(1, 2, 1), compiled, "compile: expected layers that lie whole on a rank"),
    ):
        assert message in raised(lambda layout=layout, config=config: parallel(layout, config))


@worlds(2)
def check_adapters_train_as_in_one_process_and_go_on_in_another_layout() -> None:
    """Two ranks share the batch for two steps, then the sequences; the state holds adapters and their moments alone."""
    if not PEFT.exists():  # test_train.py says so
        return
    config = train_config(lora=3, lr=0.02)
    shape = model_config(config)
    torch.manual_seed(3)
    one = Model(shape)
    base = {name: weight.detach().clone() for name, weight in one.named_parameters()}
    torch.manual_seed(5)
    lora.add(one, 3)
    alone = Trainer(one, Batches(), config)
    alone.run()
    right = {name: weight for name, weight in one.named_parameters() if weight.requires_grad}
    for layout, stop in ((Layout(2, 1, 1), 2), (Layout(1, 2, 1), 4)):
        model = ShardedModel(shape, Ranks.connect(layout, torch.device("cpu")), adapters=3)
        model.draw(3)
        model.draw_adapters(5)
        trainer = ParallelTrainer(model, Batches(), config, ranks.folder / "adapters", "x")
        trainer.run(should_stop=lambda trainer=trainer, stop=stop: trainer.step >= stop)
        assert near(trainer.losses.tolist(), alone.losses.tolist()[:stop]), (layout, trainer.losses, alone.losses)
        assert all("lora_" in name for name in tensors_of(model.trained(), trainer.optimizers))
    adapters = dict(model.gathered_adapters())
    assert adapters.keys() == right.keys() and len(right) == 2 * 4 * 2
    for name, weight in adapters.items():
        assert (weight - right[name]).abs().max() < 1e-3 * right[name].abs().max(), name  # as the losses, `near`
    assert all(torch.equal(weight, base[name]) for name, weight in model.gathered())


@worlds(2)
def check_activations_computed_again_change_nothing() -> None:
    for layout in layouts():
        losses = []
        for again in (False, True):
            trainer = parallel(layout, train_config(steps=2, checkpoint_activations=again))
            trainer.run()
            losses.append(trainer.losses.tolist())
        assert losses[0] == losses[1], (layout, losses)


def check_a_state_goes_on_in_another_layout_and_world() -> None:
    """Two ranks save after a step, two others go on after the second; then four ranks, and four others end it."""
    config = train_config(optimizer="muon")
    right = losses_alone(config)
    stops = iter((1, 2) if dist.get_world_size() == 2 else (3, 4))
    for layout, stop in zip(layouts(), stops):
        trainer = parallel(layout, config, ranks.folder / "handed over")
        assert trainer.step == stop - 1
        trainer.run(should_stop=lambda trainer=trainer, stop=stop: trainer.step >= stop)
        assert near(trainer.losses.tolist(), right[:stop]), (layout, trainer.losses, right)


@worlds(2)
def check_a_state_of_another_run_is_refused_on_every_rank() -> None:
    folder = ranks.folder / f"refused {dist.get_world_size()}"
    parallel(layouts()[0], train_config(steps=1), folder).run()
    for config, identity, said in (
        (train_config(steps=1, seed=2), "x", "has other settings: seed 0 instead of 2"),
        (train_config(steps=1), "other", "was trained on other data"),
    ):
        try:
            parallel(layouts()[1], config, folder, identity)
        except CheckpointError as error:
            assert said in str(error)
        else:
            raise AssertionError(said)
        dist.barrier()


@worlds(2)
def check_weights_that_are_not_finite_are_never_saved() -> None:
    folder = ranks.folder / f"finite {dist.get_world_size()}"
    trainer = parallel(layouts()[0], train_config(steps=2), folder)
    trainer.save()
    before = (folder / "state.json").read_text()
    with torch.no_grad():
        if dist.get_rank() == 0:
            trainer.sharded.weights()["norm.weight"].to_local()[0] = torch.nan
    try:
        trainer.save()
    except ArithmeticError as error:
        assert "norm.weight has become NaN or inf" in str(error)
    else:
        raise AssertionError("saved")
    assert (folder / "state.json").read_text() == before


@worlds(2)
def check_a_full_disk_of_one_rank_is_an_error_on_all_and_leaves_the_state() -> None:
    folder = ranks.folder / f"full {dist.get_world_size()}"
    trainer = parallel(layouts()[0], train_config(steps=2), folder)
    trainer.save()
    before = sorted(file.name for file in folder.iterdir())

    def write_data(self: Any, *_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", write_data)
        try:
            trainer.save()
        except CheckpointIOError as error:
            assert "not saved (rank 1: [Errno 28] No space left on device), the previous state is still" in str(error)
        else:
            raise AssertionError("saved")
    assert sorted(file.name for file in folder.iterdir()) == before
    assert "in use by another training run" in raised(lambda: parallel(layouts()[0], train_config(steps=2), folder))
    if trainer.lock is not None:
        trainer.lock.release()
    assert parallel(layouts()[0], train_config(steps=2), folder).step == 0


# ---- ranks that die -------------------------------------------------------------------------------------------------


def die(*_: Any) -> Any:
    os.kill(os.getpid(), signal.SIGKILL)


@worlds(2, breaks=True)
def check_a_rank_killed_in_a_save_breaks_nothing_and_is_named() -> None:
    folder = ranks.folder / "killed"
    trainer = parallel(layouts()[0], train_config(steps=2), folder)
    trainer.run()
    before = (folder / "state.json").read_text()
    with Watch(60.0, period=0.1) as watch, pytest.MonkeyPatch.context() as patch:
        watch.moved(2, "save")
        time.sleep(0.5)  # until the others have read it
        if dist.get_rank() == 1:
            patch.setattr(FileSystemWriter, "write_data", die)
        try:
            trainer.save()
        except Exception as error:
            told = watch.explained(error)
    assert re.match(r"rank 1 \(process \d+ on .+\) died in step 2; the job ends; go on from the last", str(told)), told
    assert (folder / "state.json").read_text() == before
    assert len(list(folder.glob("state-*"))) == 2  # the state, and what the save left


@worlds(2, breaks=True)
def check_what_a_save_that_breaks_leaves_is_swept_and_the_run_goes_on() -> None:
    folder = ranks.folder / "killed"
    trainer = parallel(layouts()[1], train_config(steps=2), folder)
    assert trainer.step == 2 and len(list(folder.glob("state-*"))) == 1
    assert near(trainer.losses.tolist(), losses_alone(train_config(steps=2)))
    ranks.report("check_what_a_save_that_breaks_leaves_is_swept_and_the_run_goes_on")


class Hanging(Batches):
    def batch(self, step: int) -> np.ndarray:
        if step == 1 and dist.get_rank() == 1:
            time.sleep(100)
        return super().batch(step)


@worlds(2, breaks=True)
def check_a_rank_that_hangs_breaks_the_job_and_is_named() -> None:
    def end(message: str) -> None:
        right = (
            r"rank 1 \(process \d+ on .+\) has hung for \d+ s in step 1 \(batch\), at .+train_checks.py:\d+ in batch, "
        )
        ranks.report("check_a_rank_that_hangs_breaks_the_job_and_is_named", "" if re.match(right, message) else message)
        os._exit(0)

    model = ShardedModel(model_config(train_config()), Ranks.connect(layouts()[0], torch.device("cpu")))
    model.draw(3)
    with Watch(2.0, period=0.1, end=end) as watch:
        with contextlib.suppress(RuntimeError):  # of a rank whose neighbour has judged first
            ParallelTrainer(model, Hanging(), train_config(), moved=watch.moved).run()
        os._exit(0)


@worlds(2, breaks=True)
def check_a_rank_that_stops_breaks_the_job_and_is_named() -> None:
    def end(message: str) -> None:
        right = r"rank 1 \(process \d+ on .+\) has not answered for \d+ s, in step 3; the job ends"
        ranks.report("check_a_rank_that_stops_breaks_the_job_and_is_named", "" if re.match(right, message) else message)
        os._exit(0)

    with Watch(1.0, period=0.1, end=end) as watch:
        watch.moved(3, "batch")
        time.sleep(0.3)
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()
