"""The command line: what it does from training to sampling, and one line and exit code 2 for whatever cannot be
done."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from illada import bench
from illada import demo as demo_module
from illada.checkpoint import read_config
from illada.cli import main
from illada.config import ModelConfig
from illada.decoding.fill import fill_hole
from illada.errors import PromptError
from illada.live import LiveText, ProgressBar, duration
from illada.model import Model
from illada.tokenizer import ByteTokenizer, from_json
from illada.training import runs
from illada.training.data import read_corpus
from illada.training.state import FolderLock
from illada.training.trainer import Progress
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
TEXT = "def f(x):\n    return x + 1\n" * 60
FAST = ["--length", "32", "--batch-size", "2", "--quiet", "--device", "cpu"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("data") / "text.py"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    """A block-diffusion run of a few steps, with a learned tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "block"
    command = ["train", "--out", str(folder), "--data", str(corpus), "--objective", "block", "--steps", "12"]
    assert main([*command, "--tokenizer", "bpe:265", *FAST]) == 0
    return folder


def fails(capsys, *command: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    assert main([str(part) for part in command]) == 2
    _, error = capsys.readouterr()
    assert error.startswith("illada: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_saving_every_zero_steps_is_refused_before_a_run_begins(capsys, tmp_path):
    assert "save_every: expected at least 1" in fails(capsys, "train", "--out", tmp_path / "run", "--save-every", "0")
    assert not (tmp_path / "run").exists()


# ---- what works ----------------------------------------------------------------------------------------------------


def test_training_leaves_a_model_a_log_and_a_curve(run):
    names = {path.name for path in run.iterdir()}
    assert names == {
        "run.json",
        "illada_tokenizer.json",
        "state.pt",
        "log.jsonl",
        "loss.png",
        "config.json",
        "model.safetensors",
    }
    assert (run / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()] == list(range(12))
    assert json.loads((run / "config.json").read_text())["causal_block"] == 4


def test_generate_continues_the_prompt_the_same_for_the_same_seed(run, capsys):
    command = ["generate", "--model", str(run), "--prompt", "def f", "--max-new-tokens", "8", "--temperature", "1"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed, "--device", "cpu"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2] and texts[0].startswith("def f")


def test_live_generation_prints_plain_lines_where_there_is_no_terminal(run, capsys):
    assert main(["generate", "--model", str(run), "--prompt", "def f", "--max-new-tokens", "8", "--live"]) == 0
    out, error = capsys.readouterr()
    assert "masks left" in out and "\x1b" not in out and "8 tokens in 8 passes" in error


def test_eval_prints_the_bound_beside_the_ngrams(run, corpus, capsys):
    assert main(["eval", "--model", str(run), "--data", str(corpus), "--length", "32"]) == 0
    out = capsys.readouterr().out
    assert "bits per byte at most (block diffusion, blocks of 4" in out and "unigram" in out and "bigram" in out
    assert 0 < float(out.split()[0]) < 9


def test_a_full_sequence_run_and_a_fine_tuning_run(corpus, tmp_path):
    full = tmp_path / "full"
    assert main(["train", "--out", str(full), "--data", str(corpus), "--steps", "3", *FAST]) == 0
    assert read_config(full).causal_block == 0
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "1 + 1 = ", "response": "2"}\n{"prompt": "2 + 3 = ", "response": "5"}\n')
    command = ["train", "--out", str(tmp_path / "sft"), "--data", str(pairs), "--objective", "sft", "--steps", "3"]
    assert main([*command, *FAST]) == 0


def test_the_demo_writes_its_curve_and_numbers(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_module, "TOKENIZER", "bpe:300")
    monkeypatch.setattr(demo_module, "table", lambda *a, **k: "")
    assert main(["demo", "--seconds", "2", "--out", str(tmp_path), "--data", str(corpus)]) == 0
    result = json.loads((tmp_path / "demo.json").read_text())
    assert {"bits_per_byte", "unigram", "bigram", "seconds"} <= set(result)
    assert 0 < result["bits_per_byte"] < 9 and 0 < result["bigram"] < result["unigram"] < 9
    assert (tmp_path / "loss.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "masks left" in out and "at most: the bound of block diffusion" in out
    assert demo_module.HOLE[0].rstrip() in out and demo_module.HOLE[2].rstrip() in out


def test_the_op_table_times_every_op():
    lines = bench.table(seconds=0.01).splitlines()
    assert [line.split(",")[0].split()[0] for line in lines[1:]] == ["attention", "attention", "masked_loss", "unmask"]
    assert all(" ms" in line for line in lines[1:])


# ---- what cannot be done -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty: give a file"), (b"\x00\x01", "not UTF-8 text"), (b"one line", "one line only")],
)
def test_a_corpus_without_text_is_refused(tmp_path, capsys, content, message):
    file = tmp_path / "data"
    file.write_bytes(content)
    assert message in fails(capsys, "train", "--out", tmp_path / "run", "--data", file, *FAST)
    assert not (tmp_path / "run").exists()


def test_a_missing_file_and_an_unknown_preset_are_refused(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert "does not exist" in fails(capsys, "train", "--out", out, "--data", tmp_path / "none", *FAST)
    message = fails(capsys, "train", "--out", out, "--data", corpus, "--preset", "GPT-5", *FAST)
    assert "preset: expected one of iLLaDA-8B" in message and "'GPT-5'" in message
    assert "cannot be read" in fails(capsys, "train", "--out", out, "--data", corpus, "--tokenizer", "no.json", *FAST)


def test_an_empty_or_too_long_prompt_is_refused(run, capsys):
    assert "prompt: it is empty; give" in fails(capsys, "generate", "--model", run, "--prompt", "")
    limit = json.loads((run / "config.json").read_text())["max_position_embeddings"]
    message = fails(capsys, "generate", "--model", run, "--prompt", "x" * (2 * limit))
    assert f"exceed max_seq_len = {limit}; shorten the prompt" in message


def test_a_missing_truncated_or_foreign_checkpoint_is_refused(run, tmp_path, capsys):
    command = ("generate", "--prompt", "x", "--model")
    assert "is not a folder" in fails(capsys, *command, tmp_path / "none")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "is cut short" in fails(capsys, *command, copy)
    (copy / "config.json").write_text('{"model_type": "bert"}')
    assert "expected one of the types" in fails(capsys, *command, copy)
    weights.unlink()
    assert "expected one of the types" in fails(capsys, "eval", "--model", copy)


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(run, corpus, tmp_path, capsys):
    assert "holds a run already: go on with it by --resume" in fails(
        capsys, "train", "--out", run, "--data", corpus, "--steps", "3", *FAST
    )
    message = fails(capsys, "train", "--resume", "--out", run, "--steps", "99", "--device", "cpu", "--quiet")
    assert "leave out --steps 99" in message
    assert "holds no run to resume; start one without" in fails(capsys, "train", "--resume", "--out", tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    for name in ("illada_tokenizer.json", "run.json"):  # what a message says works: without --resume this is refused
        (copy / name).rename(copy / "away")
        said = fails(capsys, "train", "--resume", "--out", copy)
        assert f"{name} is missing: put it back, or start again in another folder" in said
        (copy / "away").rename(copy / name)
    (copy / "run.json").write_text("{")
    assert "run.json is damaged" in fails(capsys, "train", "--resume", "--out", copy)
    shutil.copy(run / "run.json", copy)
    (copy / "illada_tokenizer.json").write_text("{}")
    assert "illada_tokenizer.json is damaged" in fails(capsys, "train", "--resume", "--out", copy)


def test_a_finished_run_can_be_resumed_and_is_left_as_it_is(run, capsys):
    before = (run / "log.jsonl").read_bytes()
    assert main(["train", "--resume", "--out", str(run), "--quiet"]) == 0
    assert (run / "log.jsonl").read_bytes() == before


def test_windows_that_do_not_fit_the_model_are_refused(run, corpus, tmp_path, capsys):
    command = ("train", "--out", tmp_path / "run", "--data", corpus, "--quiet")
    assert "max_seq_len" in fails(capsys, *command, "--length", "100000")
    assert "multiple of the model's causal_block" in fails(capsys, *command, "--objective", "block", "--length", "30")
    assert "max_seq_len" in fails(capsys, "eval", "--model", run, "--data", corpus, "--length", "100000")


def test_fine_tuning_without_pairs_is_refused(corpus, tmp_path, capsys):
    command = ("train", "--out", tmp_path / "run", "--objective", "sft", *FAST)
    assert "expected --data" in fails(capsys, *command)
    assert 'text.py, line 1: expected {"prompt"' in fails(capsys, *command, "--data", corpus)


@pytest.mark.parametrize("device", ["nonsense", "meta", "cuda:99"])
@pytest.mark.parametrize("command", ["train", "generate", "eval", "bench"])
def test_a_device_that_cannot_be_used_is_refused(run, corpus, tmp_path, capsys, command, device):
    arguments = {
        "train": ["--out", tmp_path / "new", "--data", corpus, "--steps", "1"],
        "generate": ["--model", run, "--prompt", "def "],
        "eval": ["--model", run, "--data", corpus],
        "bench": [],
    }[command]
    assert f"device: {device} cannot be used" in fails(capsys, command, *arguments, "--device", device)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seed", 2**64], "seed: expected a number from"),
        (["--objective", "block", "--block", 0], "block: expected an integer from 1 on, got 0"),
        (["--objective", "block", "--hole-fraction", "nan"], "hole_fraction: expected a number from 0 to 1"),
        (["--block", 4], "block: it is for --objective block or joint or"),
        (["--objective", "block", "--weighting", "cart"], "weighting: it is for --objective full only"),
    ],
)
def test_settings_of_a_run_that_make_no_sense_are_refused(corpus, tmp_path, capsys, arguments, message):
    command = ("train", "--out", tmp_path / "run", "--data", corpus, "--steps", "1", *FAST)
    assert message in fails(capsys, *command, *arguments)


def test_a_run_that_could_not_begin_is_not_in_the_way_of_the_next(corpus, tmp_path, capsys):
    command = ("train", "--out", tmp_path / "run", "--data", corpus, "--steps", "1", "--objective", "block", *FAST)
    assert "expected a multiple" in fails(capsys, *command, "--block", "5")
    assert main([*map(str, command), "--block", "4"]) == 0


@pytest.mark.parametrize("arguments", [["--draws", "0"], ["--max-bytes", "-1"], ["--length", "0"]])
def test_an_evaluation_of_nothing_is_refused(run, corpus, capsys, arguments):
    name = arguments[0][2:].replace("-", "_")
    command = ("eval", "--model", run, "--data", corpus, "--length", "32", "--device", "cpu", *arguments)
    assert f"{name}: expected at least" in fails(capsys, *command)


def test_a_demo_of_no_seconds_is_refused(corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo_module, "TOKENIZER", "bpe:300")
    error = fails(capsys, "demo", "--seconds", "0", "--data", corpus, "--out", tmp_path)
    assert "seconds: expected a positive number" in error


def test_ctrl_c_while_torch_is_imported_exits_130_with_one_line(python, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise RuntimeError\n")
    done = python("-m", "illada", "bench", path=(tmp_path, ROOT, ROOT / "python"))
    assert (done.returncode, done.stderr) == (130, "illada: interrupted\n")


def test_help_needs_no_torch(python, tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')\n")
    done = python("-m", "illada", "train", "--help", path=(tmp_path, ROOT, ROOT / "python"))
    assert done.returncode == 0 and "--device" in done.stdout


def test_public_names_come_from_the_package_and_importing_it_loads_nothing(python):
    code = """
import sys, illada
assert not {"torch", "numpy", "illada_kernels"} & set(sys.modules), "imported too early"
for name in illada.__all__:
    assert getattr(illada, name).__name__ == name, name
from illada import GenerationConfig, fill, generate, load
try:
    illada.nonsense
except AttributeError:
    print("done")
"""
    done = python("-c", code)
    assert done.stdout == "done\n", done.stderr


def test_neither_training_nor_generating_imports_the_compiler(python, tmp_path):
    """Nor what it brings along: a second and a half of every start."""
    code = """
import sys
from pathlib import Path
import illada
from tests.helpers.training import trainer
for optimizer in ("muon", "adamw"):
    folder = Path(sys.argv[1]) / optimizer
    run = trainer(folder, steps=2, lr=1e-3, optimizer=optimizer)
    run.run(should_stop=lambda: run.step >= 1)
    run = trainer(folder, steps=2, lr=1e-3, optimizer=optimizer)
    assert run.step == 1 and run.run()
illada.save(run.model, folder)
illada.generate(illada.load(folder), [[1]], illada.GenerationConfig(max_new_tokens=4))
print({"torch._dynamo", "sympy"} & set(sys.modules))
"""
    done = python("-c", code, str(tmp_path))
    assert done.stdout == "set()\n", done.stderr


def test_an_interrupt_outside_training_exits_130(monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "table", interrupt)
    assert main(["bench", "--device", "cpu"]) == 130
    assert capsys.readouterr().err == "illada: interrupted\n"


# ---- live ----------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_shows_masks_and_marks_what_is_new():
    out = Terminal()
    live = LiveText(ByteTokenizer(), out=out)
    live.show([97, 256, 256])
    assert "░░" in out.getvalue() and "\x1b[1;32m" not in out.getvalue()
    live.show([97, 0xC3, 256])
    live.show([97, 0xC3, 0xA9])
    assert "\x1b[1;32m" in out.getvalue()
    live.finish([97, 0xC3, 0xA9])
    assert out.getvalue().endswith("aé\n")


def test_the_progress_bar_tells_loss_speed_and_time_left():
    out = Terminal()
    bar = ProgressBar(out)
    bar(Progress(0, 0.0, 4.0, 0.0, 0))
    bar.shown_at = -1.0
    bar(Progress(50, 0.5, 2.0, 10.0, 5000))
    assert "50%  step 50  loss 3.000  500 tokens/s  0:10 left" in out.getvalue() and "█" in out.getvalue()
    plain = io.StringIO()
    bar = ProgressBar(plain)
    for step in range(101):
        bar(Progress(step, step / 100, 1.0, float(step), step))
    assert len(plain.getvalue().splitlines()) == 10 and "\x1b" not in plain.getvalue()
    assert duration(125.4) == "2:05"


# ---- holes ---------------------------------------------------------------------------------------------------------


def tiny(block: int) -> Model:
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "head_dim": 16, "ffn_dim": 48, "init_std": 0.3}
    ids = {"vocab_size": 259, "mask_id": 256, "eos_id": 257, "pad_id": 258, "max_seq_len": 64}
    return Model(ModelConfig.preset("demo", **shape, **ids, causal_block=block)).eval()


def test_a_hole_is_filled_from_both_sides_and_nothing_else_changes():
    """The text behind the hole changes what is put into it; a callback sees the text with fewer masks each time."""
    model, seen = tiny(4), []
    before, after = list(b"def f(x):"), list(b"return x")
    filled = fill_hole(model, before, 6, after, callback=seen.append)
    assert len(filled) == 6 and 256 not in filled
    assert all(text[:9] == before and text[15:] == after for text in seen)
    assert [text.count(256) for text in seen] == [5, 4, 3, 2, 1, 0]
    assert seen[-1][9:15] == filled
    others = [fill_hole(model, before, 6, list(np.random.default_rng(i).integers(0, 256, 8))) for i in range(4)]
    assert any(other != filled for other in others)


def test_a_hole_needs_room_and_a_block_model():
    with pytest.raises(PromptError, match="at most 64 tokens, got 60 and 70"):
        fill_hole(tiny(4), [1] * 5, 60, [1] * 5)
    with pytest.raises(PromptError, match="expected a hole"):
        fill_hole(tiny(4), [1], 0, [1])
    with pytest.raises(PromptError, match="block-causal model"):
        fill_hole(tiny(0), [1], 2, [1])


# ---- runs in odd moments -------------------------------------------------------------------------------------------


def test_a_run_inside_its_data_can_be_resumed_from_anywhere(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("hello world\n" * 300)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", ".", "--out", "run", "--steps", "2", *FAST]) == 0
    monkeypatch.chdir("/")
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    monkeypatch.chdir(tmp_path)
    assert {d.name for d in read_corpus(".")} == {"a.txt"}  # eval's held-out text is the one that training left out
    capsys.readouterr()
    assert "out: expected a folder other than --data" in fails(capsys, "train", "--data", ".", "--out", ".", *FAST)


def test_a_lower_rate_works_as_the_message_says(tmp_path, corpus, capsys):
    command = ["train", "--data", corpus, "--out", tmp_path / "run", "--steps", "6", "--save-every", "1", *FAST]
    said = fails(capsys, *command, "--lr", "1e30")
    assert "not saved; resume with a lower --lr, or check the data" in said
    assert not (tmp_path / "run" / "state.pt").exists()
    again = ["train", "--resume", "--out", str(tmp_path / "run"), "--quiet"]
    assert main([*again, "--lr", "0.001"]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["train"]["lr"] == 0.001
    assert main(again) == 0
    capsys.readouterr()
    assert "of which --lr alone may change: leave out --seed 3" in fails(capsys, *again, "--seed", "3")


def test_a_run_that_learned_nothing_says_so_in_the_end(tmp_path, corpus, capsys):
    command = ["train", "--data", str(corpus), "--out", str(tmp_path / "run"), "--steps", "20", *FAST]
    assert main([*command, "--lr", "1e9"]) == 0
    assert "illada: next to nothing was learned: the last 10 losses are" in capsys.readouterr().err


def test_a_checkpoint_with_nan_is_neither_trained_nor_evaluated(run, tmp_path, corpus, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, copy / "model.safetensors")
    more = ("--from", copy, "--steps", "1", "--length", "64", "--quiet", "--objective", "block", "--device", "cpu")
    for _ in range(2):  # it leaves nothing that would be in the way of the next attempt
        said = fails(capsys, "train", "--data", corpus, "--out", tmp_path / "run", *more)
        assert "model: expected finite weights, but norm.weight holds NaN or inf; begin with other weights" in said
    assert not (tmp_path / "run").exists()
    said = fails(capsys, "eval", "--model", copy, "--data", corpus, "--device", "cpu")
    assert "loss on this text is not finite; check its weights" in said


def test_weights_of_nan_are_not_exported(tmp_path, corpus, capsys):
    command = ("train", "--data", corpus, "--out", tmp_path / "run", "--steps", "2", "--optimizer", "adamw", *FAST)
    assert "has become NaN or inf, and was not saved" in fails(capsys, *command, "--lr", "1e30")
    assert "lr: expected a positive number up to 3.4e38" in fails(
        capsys, *command, "--out", tmp_path / "b", "--lr", "1e39"
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "a.safetensors.index.json"])
def test_a_folder_with_a_checkpoint_is_refused_before_training(tmp_path, corpus, capsys, name):
    (tmp_path / name).write_text("{}")
    assert f"holds {name} already; choose another folder" in fails(
        capsys, "train", "--data", corpus, "--out", tmp_path, "--steps", "2", *FAST
    )
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_model_that_could_not_be_replaced_is_found_before_training(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 7}))
    before = (copy / "log.jsonl").read_bytes()
    assert "model of another shape" in fails(capsys, "train", "--resume", "--out", copy, "--quiet")
    assert (copy / "log.jsonl").read_bytes() == before


def test_two_runs_in_one_folder_are_refused(run, corpus, tmp_path, capsys):
    with FolderLock(run):
        assert "in use by another training run" in fails(capsys, "train", "--resume", "--out", run, "--quiet")
    with FolderLock(tmp_path / "new"):
        assert "in use by another" in fails(capsys, "train", "--out", tmp_path / "new", "--data", corpus, *FAST)
    assert not (tmp_path / "new").exists()  # an empty folder that was made for nothing


def test_the_demo_may_be_run_again_with_other_data_but_not_in_a_run(run, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo_module, "TOKENIZER", "bpe:300")
    monkeypatch.setattr(demo_module, "table", lambda *a, **k: "")
    other = tmp_path / "other.txt"
    other.write_text("".join(f"{chr(97 + i % 23) * 3} {chr(98 + i % 5)}\n" for i in range(300)))
    for data in (corpus, other):
        assert main(["demo", "--seconds", "0.5", "--out", str(tmp_path / "demo"), "--data", str(data)]) == 0
    folder = tmp_path / "demo" / "runs" / "demo"
    saved = json.loads((folder / "illada_tokenizer.json").read_text())
    assert from_json(saved).vocab_size == read_config(folder).vocab_size
    capsys.readouterr()
    assert "is the folder of a training run" in fails(capsys, "demo", "--out", run)


EACH = """
import sys
from illada.cli import main
command = []
for argument in sys.argv[1:]:
    if argument == ";":
        assert main(command) == 0, command
    command = [] if argument == ";" else [*command, argument]
"""


def test_folders_and_prompts_of_any_name_work_with_any_encoding_of_the_output(corpus, tmp_path):
    """A folder with a line's worth of odd signs, one of them not UTF-8, and an output that knows ASCII alone; the
    commands one after the other in one process."""
    folder = os.fsencode(tmp_path) + b"/it's $x^2 \xff \xe2\x9c\x93"
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ["PYTHONPATH"]])
    env = {**os.environ, "PYTHONPATH": path, "PYTHONIOENCODING": "ascii"}
    commands = [["train", "--data", str(corpus), "--out", folder, "--steps", "2", *FAST]]
    for prompt in ("def é", b"\xff\xfe"):
        commands.append(["generate", "--model", folder, "--prompt", prompt, "--max-new-tokens", "4", "--live"])
    commands.append(["eval", "--model", folder, "--data", str(corpus), "--length", "32"])
    arguments = [argument for command in commands for argument in (*command, ";")]
    done = subprocess.run([sys.executable, "-c", EACH, *arguments], env=env, capture_output=True)
    assert done.returncode == 0 and b"bits per byte" in done.stdout, done.stderr


def test_a_joint_run_is_evaluated_as_it_is_decoded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "plot_losses", lambda *_: None)
    (tmp_path / "text").write_text("a b c d e f g h\n" * 40)
    train = ["train", "--out", str(tmp_path / "run"), "--data", str(tmp_path / "text"), "--steps", "1", "--quiet"]
    assert main([*train, "--objective", "joint", "--length", "16", "--batch-size", "1"]) == 0
    said = {}
    for flag in ([], ["--next-token"], ["--no-next-token"]):
        evaluate = ["eval", "--model", str(tmp_path / "run"), "--data", str(tmp_path / "text"), "--length", "16"]
        assert main([*evaluate, "--max-bytes", "40", *flag]) == 0
        said[tuple(flag)] = capsys.readouterr().out.splitlines()[-2]
    assert said[()] == said["--next-token",] != said["--no-next-token",]
    assert "next tokens of the causal mode" in said[()] and "blocks of 1" in said["--no-next-token",]
