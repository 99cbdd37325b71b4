"""Checkpoint folders: names of every family, refusals that list everything, saving that cannot lose what was there."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from illada.checkpoint import load, read_config, save, write
from illada.config import PRESETS
from illada.errors import CheckpointError, CheckpointIOError, ConfigError
from illada.model import Model
from illada.tensor_names import entries
from safetensors.torch import load_file, save_file

from tests.helpers.models import make, tiny, tokens_of


def assert_same(a: Model, b: Model) -> None:
    assert a.config == b.config
    for (name, mine), (other, theirs) in zip(a.named_parameters(), b.named_parameters()):
        assert name == other and torch.equal(mine, theirs.to(mine)), name


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Model, Path]:
    model = make(tiny(), dtype=torch.float32)
    save(model, tmp_path / "model")
    return model, tmp_path / "model"


# ---- names -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("max_shard_bytes", [2**30, 5000])
def test_every_family_survives_saving_and_loading(preset, max_shard_bytes, tmp_path):
    model = make(tiny(preset), dtype=torch.float32)
    save(model, tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / "model.safetensors").exists() == (max_shard_bytes > 5000)
    assert_same(load(tmp_path), model)
    assert not load(tmp_path).training


LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
LLAMA += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]
LLADA = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out", "attn_norm", "ff_norm"]
PUBLISHED = {  # the tensors of the published files, layer by layer
    "iLLaDA-8B": ("model.layers.{}.", LLAMA, ["model.embed_tokens", "model.norm"]),
    "LLaDA-8B": ("model.transformer.blocks.{}.", LLADA, [f"model.transformer.{n}" for n in ("wte", "ln_f", "ff_out")]),
    "Dream-7B": ("model.layers.{}.", LLAMA, ["model.embed_tokens", "model.norm", "lm_head"]),
    "SDAR-8B": (
        "model.layers.{}.",
        [*LLAMA, "self_attn.q_norm", "self_attn.k_norm"],
        ["model.embed_tokens", "model.norm", "lm_head"],
    ),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_tensor_names_are_those_of_the_published_files(preset):
    prefix, in_layer, outside = PUBLISHED[preset]
    config = PRESETS[preset]
    names = {f"{n}.weight" for n in outside}
    names |= {f"{prefix.format(i)}{n}.weight" for i in range(config.n_layers) for n in in_layer}
    if preset == "Dream-7B":
        names |= {f"{prefix.format(i)}self_attn.{n}_proj.bias" for i in range(config.n_layers) for n in "qkv"}
    assert {entry.name for entry in entries(config)} == names
    if preset == "LLaDA-8B":
        assert len(names) == 291


@pytest.mark.parametrize("preset", PRESETS)
def test_entries_cover_every_parameter_once(preset):
    config = tiny(preset)
    covered = {name: torch.zeros(p.shape[0]) for name, p in Model(config, device="meta").named_parameters()}
    for entry in entries(config):
        covered[entry.parameter][entry.start : entry.stop] += 1
    assert all((rows == 1).all() for rows in covered.values())


def test_each_name_goes_to_its_own_place(saved):
    """Written here by hand: q before k before v, gate before up."""
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    c, layer = model.config, model.layers[1]
    q, k, v = layer.qkv_proj.weight.split([c.n_heads * c.head_dim] + [c.n_kv_heads * c.head_dim] * 2)
    for name, wanted in (("q", q), ("k", k), ("v", v)):
        assert torch.equal(tensors[f"model.layers.1.self_attn.{name}_proj.weight"], wanted)
    gate, up = layer.gate_up_proj.weight.chunk(2)
    assert torch.equal(tensors["model.layers.1.mlp.gate_proj.weight"], gate)
    assert torch.equal(tensors["model.layers.1.mlp.up_proj.weight"], up)
    assert torch.equal(tensors["model.layers.1.input_layernorm.weight"], layer.attn_norm.weight)
    assert torch.equal(tensors["model.embed_tokens.weight"], model.embed.weight)


def test_dtype_is_kept_or_converted(saved, tmp_path):
    model, folder = saved
    assert load(folder).dtype == torch.float32
    assert_same(load(folder, dtype=torch.bfloat16), model.bfloat16())
    save(make(tiny(), dtype=torch.float32), tmp_path / "half", dtype=torch.bfloat16)
    assert load(tmp_path / "half").dtype == torch.bfloat16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert_same(load(tmp_path / "half"), model)


def test_a_loaded_model_computes_the_same(saved):
    model, folder = saved
    tokens = tokens_of(model.config, 2, 11)
    assert torch.equal(load(folder)(tokens), model(tokens))


def test_a_tied_head_may_be_stored_but_not_differ(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    assert_same(load(folder), model)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs .* set tie_word_embeddings to false"):
        load(folder)


# ---- refusals ----------------------------------------------------------------------------------------------------


def test_every_wrong_tensor_is_listed_at_once(saved):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)  # a buffer: computed, not stored
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(24, 23)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "2 missing: model.layers.1.mlp.up_proj.weight, model.norm.weight;" in text
    assert "1 unexpected: model.layers.7.mlp.up_proj.weight;" in text
    assert "1 wrongly shaped: model.layers.0.self_attn.q_proj.weight (24, 23) instead of (24, 24)" in text
    assert "inv_freq" not in text


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_a_file_cut_short_is_refused_by_name(saved, keep):
    _, folder = saved
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .*cut short"):
        load(folder)


def test_damaged_files_are_one_clear_error(saved):
    _, folder = saved
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for header in (b'{"x": 3}', b"[1, 2]", b"\xff\xfe", b'{"x": {"dtype": "F32"}}'):
        file.write_bytes(len(header).to_bytes(8, "little") + header + whole)
        with pytest.raises(CheckpointError, match="the header is damaged; get the file again"):
            load(folder)
    header = b'{"x": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header + b"0")
    with pytest.raises(CheckpointError, match="dtype F8_E4M3 is not supported"):
        load(folder)


def test_what_is_not_a_checkpoint_says_what_one_is(saved, tmp_path):
    _, folder = saved
    with pytest.raises(CheckpointIOError, match=r"nowhere is not a folder on this machine; expected one with"):
        load(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"config\.json is missing; a checkpoint folder holds"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(ConfigError, match=r"expected one of the types illada, .* got gpt2"):
        load(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointIOError, match=r"holds no weights: expected model\.safetensors or"):
        load(folder)


def test_an_index_is_checked_before_anything_is_read(tmp_path):
    save(make(tiny(), dtype=torch.float32), tmp_path, max_shard_bytes=20000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    with pytest.raises(CheckpointIOError, match=f"1 of {len(shards)} shards missing: {shards[1].name}"):
        load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"expected plain file names, got '\.\./secret"):
        load(tmp_path)
    index.write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object with weight_map"):
        load(tmp_path)


# ---- saving ------------------------------------------------------------------------------------------------------


def test_saving_again_replaces_the_weights_and_keeps_other_files(tmp_path):
    first, second = (make(tiny(), seed=s, dtype=torch.float32) for s in (1, 2))
    for before, after in ((2**30, 2**30), (2**30, 20000), (20000, 20000), (20000, 2**30)):
        folder = tmp_path / f"{before}-{after}"
        save(first, folder, max_shard_bytes=before)
        (folder / "tokenizer.json").write_text("{}")
        save(second, folder, max_shard_bytes=after)
        assert_same(load(folder), second)
        save(second, tmp_path / f"fresh-{after}", max_shard_bytes=after)
        fresh = {f.name.split("-")[-1] for f in (tmp_path / f"fresh-{after}").iterdir()}
        assert {f.name.split("-")[-1] for f in folder.iterdir()} == {*fresh, "tokenizer.json"}
        assert len(list(folder.iterdir())) == 1 + len(list((tmp_path / f"fresh-{after}").iterdir()))


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20000])
@pytest.mark.parametrize("before", [2**30, 20000])
def test_a_failure_at_any_write_leaves_the_previous_checkpoint(tmp_path, monkeypatch, max_shard_bytes, before):
    """Every file that saving writes, flushes or renames fails in turn, as a full disk does."""
    old, new = (make(tiny(), seed=s, dtype=torch.float32) for s in (1, 2))
    save(old, tmp_path, max_shard_bytes=before)
    names = {f.name for f in tmp_path.iterdir()}
    real = {name: getattr(write, name) for name in ("_write_shard", "_write_json", "_flush")}
    for fail_at in range(1, 100):
        calls, committed = 0, False

        def failing(name):
            def call(*args):
                nonlocal calls, committed
                calls += 1
                committed = args[0] == tmp_path  # the folder's list of names is flushed after the last rename
                if calls == fail_at:  # noqa: B023
                    if name == "_write_shard":
                        args[0].write_bytes(b"half")
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return real[name](*args)

            return call

        for name in real:
            monkeypatch.setattr(write, name, failing(name))
        try:
            save(new, tmp_path, max_shard_bytes=max_shard_bytes)
        except CheckpointIOError as error:
            assert "not saved (No space left on device); free space or save elsewhere" in str(error)
            assert_same(load(tmp_path), new if committed else old)
            if committed:
                break
            assert {f.name for f in tmp_path.iterdir()} == names  # nothing half written stays
    assert committed and fail_at >= 5
    for name in real:
        monkeypatch.setattr(write, name, real[name])
    save(new, tmp_path, max_shard_bytes=max_shard_bytes)
    assert_same(load(tmp_path), new)


FULL_DISK = """
import resource, signal, sys, torch
sys.path[:0] = {path!r}
from tests.helpers.models import make, tiny
from illada.checkpoint import save
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = make(tiny(), seed=2, dtype=torch.float32)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    save(model, sys.argv[1])
except OSError as error:
    print(type(error).__name__, error)
"""


def test_files_that_may_not_grow_leave_the_previous_checkpoint(tmp_path):
    old = make(tiny(), seed=1, dtype=torch.float32)
    save(old, tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    root = Path(__file__).parents[2]
    code = FULL_DISK.format(path=[str(root), str(root / "python")])
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CheckpointIOError") and "not saved" in done.stdout
    assert {f.name for f in tmp_path.iterdir()} == names
    assert_same(load(tmp_path), old)


def test_a_checkpoint_of_another_shape_is_not_overwritten(saved):
    model, folder = saved
    with pytest.raises(CheckpointError, match="holds a model of another shape; save elsewhere, or delete it first"):
        save(make(tiny(dim=16), dtype=torch.float32), folder)
    assert_same(load(folder), model)


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointIOError, match="file: not saved"):
        save(make(tiny()), tmp_path / "file")


def test_the_single_file_comes_first_as_in_transformers(tmp_path):
    old, new = (make(tiny(), seed=s, dtype=torch.float32) for s in (1, 2))
    save(old, tmp_path, max_shard_bytes=20000)
    save(new, tmp_path / "merged")
    (tmp_path / "merged" / "model.safetensors").replace(tmp_path / "model.safetensors")  # what a merging tool leaves
    assert_same(load(tmp_path), new)
    save(old, tmp_path, max_shard_bytes=20000)  # and neither file is left to shadow the other
    assert_same(load(tmp_path), old)
    save(new, tmp_path)
    assert_same(load(tmp_path), new)
    assert not (tmp_path / "model.safetensors.index.json").exists()


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
def test_all_files_have_the_mode_that_the_umask_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(make(tiny(), dtype=torch.float32), tmp_path, max_shard_bytes=20000)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~umask}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_weights_that_would_not_be_finite_are_not_saved(saved, bad):
    model, folder = saved
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with torch.no_grad():
        model.layers[1].down_proj.weight[3, 5] = bad
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight: it has NaN or inf in float16"):
        save(model, folder, dtype=torch.float16)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_what_killed_saves_left_is_swept(saved):
    model, folder = saved
    for name in ("config-0123abcd.json", "index-0123abcd.json", "model-0123abcd-00001-of-00002.safetensors"):
        (folder / name).write_text("{}")
    (folder / "config-original.json").write_text("{}")
    save(model, folder)
    assert {f.name for f in folder.iterdir()} == {"config.json", "config-original.json", "model.safetensors"}


def test_weights_of_another_format_are_named(saved):
    _, folder = saved
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointIOError, match=r"pytorch_model\.bin is of another format, convert it to safetensors"):
        load(folder)


def test_a_tied_head_may_be_stored_instead_of_the_embedding(saved):
    model, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, folder / "model.safetensors")
    assert_same(load(folder), model)


def test_a_compiled_model_is_saved_as_the_model_that_it_wraps(saved, tmp_path):
    model, folder = saved
    save(torch.compile(model, backend="eager"), tmp_path / "whole")
    assert_same(load(tmp_path / "whole"), model)
    config = (tmp_path / "whole" / "config.json").read_text()
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    save(model, tmp_path / "part")
    assert (tmp_path / "part" / "config.json").read_text() == config
    assert_same(load(tmp_path / "part"), load(folder))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_names_with_a_wrapper_s_prefix_are_one_short_error(saved, prefix):
    _, folder = saved
    tensors = {prefix + name: tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"begin with '{prefix}', which a wrapper of the model added") as caught:
        load(folder)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int8, int])
def test_a_dtype_that_weights_cannot_have_is_named(saved, dtype):
    model, folder = saved
    for call in (lambda: load(folder, dtype=dtype), lambda: save(model, folder, dtype=dtype)):
        with pytest.raises(TypeError, match=r"dtype: expected None or one of torch\.float64, .*, got"):
            call()


@pytest.mark.parametrize("device", ["cuda:99", "nothing", None, 3.5])
def test_a_device_that_cannot_be_used_is_named_before_anything_is_read(device, tmp_path):
    with pytest.raises(ValueError, match=f"device: {device} cannot be used"):
        load(tmp_path / "nowhere", device=device)


def test_a_path_or_model_that_is_none_is_named(saved, tmp_path):
    model, _ = saved
    for call in (load, lambda path: save(model, path), read_config):
        with pytest.raises(TypeError, match=r"path: expected a folder's path, a str or os\.PathLike, got NoneType"):
            call(None)
    with pytest.raises(TypeError, match="model: expected a Model, got NoneType"):
        save(None, tmp_path / "new")
    with pytest.raises(ValueError, match="max_shard_bytes: expected an integer of at least 1, got 0"):
        save(model, tmp_path / "new", max_shard_bytes=0)
    assert not (tmp_path / "new").exists()


def test_a_save_that_is_refused_leaves_no_new_folder(saved, tmp_path):
    model, _ = saved
    with torch.no_grad():
        model.embed.weight[0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="nothing was saved"):
        save(model, tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    (tmp_path / "kept").mkdir()
    with pytest.raises(CheckpointError, match="nothing was saved"):
        save(model, tmp_path / "kept")
    assert (tmp_path / "kept").is_dir() and not list((tmp_path / "kept").iterdir())
