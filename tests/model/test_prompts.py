"""illada generate: prompts from arguments, files and pipes, settings, the page that replays, and what goes wrong."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from illada import GenerationConfig, Model, ModelConfig, generate, load, save
from illada.cli import _decoding_options, main
from illada.decoding.decoder import Decoder
from illada.decoding.samplers import SAMPLERS
from illada.packing import fast_dtype
from illada.replay import Recorder
from illada.tokenizer import ByteTokenizer

from illada_kernels import Remask, Threshold, TopK
from tests.helpers import forks

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model of bytes with drawn weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("models") / "bytes"
    save(
        Model(ModelConfig.preset("demo", n_layers=1, dim=32, vocab_size=259, mask_id=256, eos_id=257, pad_id=258)), path
    )
    return path


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in ("def a", "x = ", "é", "# ", "import")))
    return path


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def command(folder: Path, *more: str) -> list[str]:
    few = ("--max-new-tokens", "8", "--block-length", "4", "--dtype", "float32")
    return ["generate", "--model", str(folder), *few, *map(str, more)]


def fails(capsys, *arguments: str) -> str:
    assert main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("illada: ") and error.count("\n") == 1
    return error


def test_a_file_of_prompts_gives_a_line_for_each_the_same_as_alone(folder, prompts, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    more = ("--prompts", prompts, "--out", out, "--batch-size", "2", "--stop-ids", "--temperature", "1")
    assert main(command(folder, *more)) == 0
    shown = capsys.readouterr()
    assert shown.out == "" and "40 tokens in " in shown.err and "tokens/s" in shown.err
    done = {row["index"]: row for row in lines(out.read_text())}
    model, tokenizer = load(folder), ByteTokenizer()
    for index, text in enumerate(("def a", "x = ", "é", "# ", "import")):
        config = GenerationConfig(max_new_tokens=8, block_length=4, stop_ids=(), temperature=1.0, seed=index)
        alone = generate(model, [list(text.encode())], config)
        row = done[index]
        assert (row["prompt"], row["text"]) == (text, tokenizer.decode(alone.tokens[0]))
        assert (row["tokens"], row["passes"]) == (8, alone.passes[0])


def test_a_byte_order_mark_before_the_prompts_is_no_part_of_them(folder, capsys, monkeypatch, tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('\ufeff{"prompt": "a"}\r\n\r\n{"prompt": "\\ufeffb"}\r\n', encoding="utf-8", newline="")
    assert main(command(folder, "--prompts", path)) == 0
    from_file = sorted(row["prompt"] for row in lines(capsys.readouterr().out))
    monkeypatch.setattr("sys.stdin", path.open(encoding="utf-8"))
    assert main(command(folder, "--prompts", "-")) == 0
    assert from_file == sorted(row["prompt"] for row in lines(capsys.readouterr().out)) == ["a", "\ufeffb"]


def test_standard_input_is_read_as_it_comes(folder):
    process = subprocess.Popen(
        [sys.executable, "-m", "illada", *command(folder, "--prompts", "-", "--batch-size", "1")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    for text in ("one", "two"):  # the second is written when the first has been answered
        process.stdin.write(json.dumps({"prompt": text}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["prompt"] == text
    process.stdin.close()
    assert process.wait(60) == 0


def test_blocks_are_written_when_they_are_full(folder, monkeypatch):
    """What stands on standard output after each pass, for a prompt on the command line."""
    from illada.prompts import BlockStream

    written: list[str] = []

    class Out:
        def write(self, text):
            written.append(text)

        def flush(self):
            pass

    model, tokenizer = load(folder), ByteTokenizer()
    stream = BlockStream(tokenizer, "ab", 2, Out())  # type: ignore[arg-type]
    after: list[str] = []

    def watch(step):
        stream(step)
        after.append("".join(written))

    bias = dict.fromkeys(b"xyz", 50.0)
    config = GenerationConfig(max_new_tokens=8, block_length=4, rule=TopK(2), stop_ids=(), logit_bias=bias)
    text = tokenizer.decode(generate(model, [[97, 98]], config, watch).tokens[0])
    stream.finish(text)
    assert after == ["ab", "ab", "ab" + text[:4], "ab" + text[:4]]
    assert "".join(written) == "ab" + text + "\n"


def test_every_setting_reaches_the_decoder(folder, monkeypatch):
    import illada.prompts

    seen: list[GenerationConfig] = []
    original = illada.prompts.generate
    monkeypatch.setattr(illada.prompts, "generate", lambda m, p, c, w: seen.append(c) or original(m, p, c, w))
    more = "--threshold 0.5 --remask 2 --revise-steps 3 --cache dual --refresh-every 2 --guidance 0.5 --forbid 1 2"
    more += " --defer 3 --logit-bias 5=1.5 --growing-bias 6=0.1 --temperature 0.5 --confidence sampled --all-masks"
    more += " --rank-temperature 0.1 --order confidence --confidence-temperature 0.7 --stop-ids 7 8 --seed 9"
    more += " --top-k 40 --top-p 0.9 --min-p 0.05"
    assert main(command(folder, "--prompt", "a", *more.split())) == 0
    c = seen[0]
    assert isinstance(c.rule, Threshold) and c.rule.tau == 0.5 and isinstance(c.revise, Remask) and c.revise.n == 2
    got = (c.revise_steps, c.cache, c.refresh_every, c.guidance, c.forbid, c.defer, c.stop_ids, c.seed)
    assert got == (3, "dual", 2, 0.5, [1, 2], [3], [7, 8], 9)
    got = (c.logit_bias, c.growing_bias, c.temperature, c.confidence, c.variable_length, c.confidence_temperature)
    assert got == ({5: 1.5}, {6: 0.1}, 0.5, "sampled", False, 0.7)
    assert (c.top_k, c.top_p, c.min_p) == (40, 0.9, 0.05)
    assert (
        main(
            ["generate", "--model", str(folder), "--prompt", "a", "--sampler", "d3llm", "--sampler-option", "length=4"]
        )
        == 0
    )
    assert seen[1].sampler == "d3llm" and seen[1].sampler_options == {"length": 4.0}
    assert main(command(folder, "--prompt", "a", "--threshold", "0.9", "--at-least", "2", "--append-blocks")) == 0
    assert (seen[2].rule.tau, seen[2].rule.at_least, seen[2].variable_length) == (0.9, 2, True)


def test_every_field_of_the_settings_has_an_option():
    parser = argparse.ArgumentParser()
    _decoding_options(parser)
    options = {action.dest for action in parser._actions}
    others = {"rule": "threshold", "revise": "edit", "sampler_options": "sampler_option"}
    fields = {others.get(f.name, f.name) for f in dataclasses.fields(GenerationConfig)}
    assert fields - options == {"stop_when"}  # a function
    assert options - fields == {"help", "at_least", "remask"}


@pytest.mark.parametrize(
    "more, message",
    [
        (("--prompt", "a", "--edit", "0.5", "--remask", "1"), "edit: expected none with --remask"),
        (("--prompt", "a", "--sampler", "best"), "sampler: expected one of llada, illada"),
        (
            ("--prompt", "a", "--sampler", "d3llm", "--sampler-option", "x"),
            "sampler-option: expected NAME=NUMBER, got 'x'",
        ),
        (("--prompt", "a", "--logit-bias", "a=1"), "logit-bias: expected ID=NUMBER, got 'a=1'"),
        (("--prompt", "a", "--steps", "3"), "steps: expected a multiple of the 2 blocks of 4 tokens, got 3"),
        (("--prompts", "none.jsonl"), "none.jsonl"),
        (("--prompts", "-", "--live"), "prompts: --html and --live show what is given by --prompt"),
        (("--prompt", "a", "--logit-bias", "5=1", "--logit-bias", "5=2"), "logit-bias: expected 5 once, got '5=2'"),
        (("--prompt", "a", "--logit-bias", "5=1e39"), "logit_bias: expected numbers that float32 holds, got 1e+39"),
        (("--prompt", "a", "--growing-bias", "5=1e38"), "float32 holds, 8 tokens times over, got 1e+38"),
        (("--prompt", "a", "--revise-steps", "5"), "revise_steps: expected --edit or --remask beside it"),
        (("--prompt", "a", "--at-least", "2"), "at_least: expected --threshold beside it"),
        (("--prompt", "a", "--threshold", "0.5", "--at-least", "-1"), "at_least"),
        (("--prompt", "a", "--batch-size", "0"), "batch_size: expected at least 1, got 0"),
        (("--prompt", "a", "--guidance", "-1"), "guidance: expected a number of at least 0, got -1.0; 0 is"),
        (("--prompt", "a", "--prompt", "b" * 2000), "--prompt 2: prompt: 2000 tokens and max_new_tokens = 8 exceed"),
        (("--prompt", "a", "--threshold", "2"), "Threshold.tau"),
        (("--prompt", "a", "--html", "."), "Is a directory"),
    ],
)
def test_settings_that_cannot_be_are_one_line(folder, capsys, more, message):
    """And nothing is written to standard output."""
    assert main(command(folder, *more)) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.startswith("illada: ") and error.count("\n") == 1 and message in error


@pytest.mark.parametrize("option", ["length=0", "length=2.5", "length=1e300", "open_at=7"])
def test_sizes_of_open_blocks_are_checked(folder, capsys, option):
    arguments = ["generate", "--model", str(folder), "--prompt", "a", "--sampler", "d3llm", "--sampler-option", option]
    assert "sampler_options: expected a whole length and open_at of at most 1" in fails(capsys, *arguments)


@pytest.mark.parametrize("sampler", [*SAMPLERS])
def test_every_sampler_takes_prompts_from_a_file_and_from_arguments(folder, prompts, capsys, sampler):
    few = ["generate", "--model", str(folder), "--sampler", sampler, "--max-new-tokens", "4", "--batch-size", "2"]
    few += ["--steps", "4"] if sampler.startswith(("dream", "remdm")) else []
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    assert main([*few, "--prompts", str(prompts)]) == 0
    found = {row["index"]: row for row in lines(capsys.readouterr().out)}
    assert [found[i]["prompt"] for i in range(5)] == texts
    assert main([*few, *(part for text in texts for part in ("--prompt", text))]) == 0
    assert capsys.readouterr().out == "".join(text + found[i]["text"] + "\n" for i, text in enumerate(texts))


@pytest.mark.parametrize("cache", ["none", "prefix", "dual", "vicinity", "interval"])
def test_every_cache_is_taken(folder, prompts, capsys, cache):
    more = ["--refresh-every", "1"] if cache != "none" else []
    assert main(command(folder, "--prompts", prompts, "--cache", cache, "--end-early", "--guidance", "0.5", *more)) == 0
    rows = lines(capsys.readouterr().out)
    assert main(command(folder, "--prompts", prompts, "--end-early", "--guidance", "0.5")) == 0
    assert lines(capsys.readouterr().out) == rows and len(rows) == 5


def test_results_of_another_run_stay_until_the_first_line_comes(folder, prompts, capsys, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    for wrong in (["--top-k", "3"], ["--threshold", "2"], ["--sampler", "canvas", "--cache", "dual"]):
        fails(capsys, *command(folder, "--prompts", prompts, "--out", out, *wrong))
        assert out.read_text() == "old\n"
    message = "out: expected a file other than --prompts"
    assert message in fails(capsys, *command(folder, "--prompts", prompts, "--out", prompts))
    assert len(prompts.read_text().splitlines()) == 5
    assert main(command(folder, "--prompt", "a", "--prompt", "b", "--out", out)) == 0
    assert [row["prompt"] for row in lines(out.read_text())] == ["a", "b"]
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    assert main(command(folder, "--prompts", empty, "--out", out)) == 0 and out.read_text() == ""


@pytest.mark.parametrize("line", ["[1]", "{", '{"prompt": ""}', '{"text": "a"}', '{"prompt": 3}', "[" * 99999])
def test_a_line_that_is_no_prompt_is_named(folder, capsys, tmp_path, line):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'\n{{"prompt": "a"}}\n{line}\n')
    assert 'bad.jsonl, line 3: expected {"prompt": "..."}, got' in fails(capsys, *command(folder, "--prompts", path))
    path.write_text(json.dumps({"prompt": "x" * 5000}))
    assert "line 1: prompt: 5000 tokens and max_new_tokens" in fails(capsys, *command(folder, "--prompts", path))


def test_bytes_and_escapes_that_are_no_text_are_named_with_their_line(folder, capsys, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": "\\ud800"}\n')
    assert "bad.jsonl, line 2: expected text, got half of a surrogate" in fails(
        capsys, *command(folder, "--prompts", path)
    )
    path.write_bytes(b'{"prompt": "a"}\n' + b'{"prompt": "\xff"}\n')
    assert "bad.jsonl, after line " in fails(capsys, *command(folder, "--prompts", path))


def test_a_model_of_nan_is_one_line(folder, prompts, capsys, monkeypatch):
    import illada.prompts

    model = load(folder)
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    monkeypatch.setattr(illada.prompts, "open_model", lambda *options: (model, ByteTokenizer()))
    assert "8 positions stayed masked" in fails(capsys, *command(folder, "--prompt", "a"))
    assert "ticket 0: 8 positions stayed masked" in fails(capsys, *command(folder, "--prompts", prompts))


def test_what_is_done_stays_on_disk_when_interrupted(folder, tmp_path):
    """The model waits for a second line that never comes."""
    out = tmp_path / "out.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "illada", *command(folder, "--prompts", "-", "--out", out, "--batch-size", "1")],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdin is not None
    process.stdin.write('{"prompt": "a"}\n')
    process.stdin.flush()
    until = time.monotonic() + 120
    while not (out.exists() and out.read_text()) and time.monotonic() < until:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error == "illada: interrupted\n"
    assert lines(out.read_text())[0]["prompt"] == "a"


def test_several_prompts_that_are_done_stay_on_disk_when_interrupted(folder, tmp_path, capsys, monkeypatch):
    """Ctrl-C comes in the second one's second pass."""
    out, step, passes = tmp_path / "out.jsonl", Decoder.step, iter(range(9))

    def interrupted(decoder: Decoder) -> int:
        made = step(decoder)
        if out.exists() and out.read_text() and next(passes) == 1:
            signal.raise_signal(signal.SIGINT)
        return made

    monkeypatch.setattr(Decoder, "step", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        more = ("--out", out, "--batch-size", "1", "--prompt", "a", "--prompt", "b", "--stop-ids")
        assert main(command(folder, *more)) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    shown = capsys.readouterr()
    assert [row["prompt"] for row in lines(out.read_text())] == ["a"]
    assert shown.out.startswith("a") and shown.err == "illada: interrupted\n"


def test_a_closed_pipe_ends_the_command_without_a_word(folder, prompts, python, tmp_path):
    ways = (("--prompts", prompts), ("--prompt", "a"), ("--prompt", "a", "--live"), ("--prompt", "a", "--prompt", "b"))
    commands = [[forks.Command(command(folder, *more), forks.CLOSED_PIPE)] for more in ways]
    assert forks.run(python, tmp_path / "forks", commands, ["torch"]) == [[(141, "")]] * len(ways)


def run(folder: Path, redirection: str, *more: str) -> subprocess.CompletedProcess:
    """Runs the command in a shell."""
    words = shlex.join([sys.executable, "-m", "illada", *command(folder, *more)])
    return subprocess.run(["sh", "-c", f"{words} {redirection}"], capture_output=True, text=True, timeout=120)


def test_streams_that_were_closed_before_are_like_dev_null_or_named(folder, tmp_path):
    done = run(folder, ">&-", "--prompt", "a", "--out", tmp_path / "out")
    assert done.returncode == 0 and done.stdout == "" and done.stderr.startswith("8 tokens in 8 passes")
    assert [row["prompt"] for row in lines((tmp_path / "out").read_text())] == ["a"]
    done = run(folder, "2>&-", "--prompt", "a")
    assert done.returncode == 0 and done.stdout.startswith("a") and "tokens in" not in done.stdout
    done = run(folder, "<&-", "--prompts", "-")
    assert done.returncode == 2
    assert done.stderr == "illada: prompts: expected lines from standard input, which is closed; name a file\n"


def test_the_page_and_the_lines_go_to_two_files(folder, tmp_path, capsys):
    (tmp_path / "other").symlink_to(tmp_path / "page")
    for other in ("page", "other"):
        more = ("--prompt", "a", "--html", str(tmp_path / "page"), "--out", str(tmp_path / other))
        assert "out: expected a file other than --html" in fails(capsys, *command(folder, *more))


# ---- the page ------------------------------------------------------------------------------------------------------


def recorded(folder: Path) -> Recorder:
    model = load(folder)
    recorder = Recorder(ByteTokenizer(), [[60, 47, 98], [97]])  # "</b"
    config = GenerationConfig(
        max_new_tokens=6, block_length=6, rule=TopK(2), stop_ids=(), revise=Remask(1), revise_steps=3, seed=3
    )
    generate(model, [[60, 47, 98], [97]], config, recorder)
    return recorder


def test_a_recording_holds_every_change(folder):
    recorder = recorded(folder)
    kinds = [change["kind"] for changes in recorder.passes for change in changes]
    assert kinds.count("filled") - kinds.count("taken back") == 12 and "taken back" in kinds
    rows = [[*prompt, *[256] * 6] for prompt in recorder.prompts]
    for changes in recorder.passes:
        for change in changes:
            rows[change["row"]][change["at"]] = change["token"]
            assert 0 <= change["sure"] <= 1
    assert rows == recorder.before and all(256 not in row for row in rows)
    assert recorder.page().count("</script>") == 2  # the record holds none, whatever the text
    assert "http" not in recorder.page() and "<iframe" in recorder._repr_html_()


def test_a_recording_takes_every_kind_of_prompts_and_refuses_those_of_others():
    model = Model(ModelConfig.preset("demo", n_layers=1, dim=32)).eval()
    config = GenerationConfig(max_new_tokens=4, stop_ids=())
    wanted = None
    for prompts in ([[60, 47]], torch.tensor([[60, 47]]), [torch.tensor([60, 47])], np.array([[60, 47]]), ((60, 47),)):
        recorder = Recorder(ByteTokenizer(), prompts)
        generate(model, prompts, config, recorder)
        wanted = wanted or recorder.page()
        assert recorder.page() == wanted
    with pytest.raises(ValueError, match="prompts: expected those of 2 sequences, got 1"):
        generate(model, [[1], [2]], config, Recorder(ByteTokenizer(), [[1]]))


def test_a_browser_plays_the_page(folder, tmp_path):
    """Headless chromium runs the script; a second one presses the buttons first and reports what it sees."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    recorder = recorded(folder)

    def dom(page: str) -> str:
        path = tmp_path / "page.html"
        path.write_text(page, encoding="utf-8")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", "--virtual-time-budget=10000"]
        done = subprocess.run([browser, *options, path.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-500:]
        return done.stdout

    last = len(recorder.passes)
    shown = dom(recorder.page())
    assert f"pass {last} of {last}" in shown
    assert shown.count('<span class="prompt"') == 4 and shown.count('class="mask"') == 0
    script = """<script>
      const seen = [];
      by("seek").value = 0; by("seek").oninput(); seen.push(document.querySelectorAll(".mask").length);
      by("next").onclick(); seen.push(document.querySelectorAll(".now").length);
      document.querySelector(".now").onmouseenter(); seen.push(by("about").textContent);
      by("back").onclick(); seen.push(by("count").textContent);
      by("play").onclick();
      setTimeout(() => { seen.push(by("count").textContent, by("play").textContent);
                         document.title = JSON.stringify(seen); }, 8000);
    </script></html>"""
    played = dom(recorder.page().replace("</html>", script))
    title = played[played.index("<title>") + 7 : played.index("</title>")]
    masks, now, about, at, end, button = json.loads(title)
    assert (masks, now, at, end, button) == (12, 4, f"pass 0 of {last}", f"pass {last} of {last}", "Play")
    assert "pass 1 filled" in about and "confidence 0." in about


def test_the_command_writes_the_page(folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(command(folder, "--prompt", "def ", "--html", page, "--sampler", "fast-dllm-threshold")) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith("def ")
    assert "No such file" in fails(capsys, *command(folder, "--prompt", "a", "--html", tmp_path / "no" / "x.html"))


@pytest.mark.parametrize(
    "options, said",
    [
        ([], f"{fast_dtype('cpu')}, packed layers\n"),
        (["--dtype", "float32"], "float32, packed layers\n"),
        (["--dtype", "bfloat16"], "bfloat16, packed layers\n"),
        (["--dtype", "bfloat16", "--weights", "int8"], "bfloat16, packed layers, int8 weights\n"),
    ],
)
def test_the_statistics_say_in_what_a_pass_ran(options, said, tmp_path, capsys):
    save(Model(ModelConfig.preset("demo", n_layers=1)).eval(), tmp_path)
    few = ["--max-new-tokens", "4", "--device", "cpu"]
    assert main(["generate", "--model", str(tmp_path), "--prompt", "ab", *few, *options]) == 0
    assert capsys.readouterr().err.endswith(said)
