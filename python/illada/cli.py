"""The `illada` command: train, generate, record, eval, bench, demo.

Bad input ends with one line on stderr and exit code 2, Ctrl-C with 130.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ConfigError, DecodingError, PromptError, RankError
from .training import command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks must not end a command
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    options = parser().parse_args(arguments)
    try:
        _load_torch()
        _check_common(options)
        return options.run(options)
    except KeyboardInterrupt:
        print("illada: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `illada generate | head`
        sys.stderr.close()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise the flush at exit fails again
        return 141
    except (
        CheckpointError,
        ConfigError,
        DecodingError,
        PromptError,
        RankError,
        ValueError,
        ArithmeticError,
        ModuleNotFoundError,
        OSError,
    ) as error:
        print(f"illada: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="illada", description="Train a masked-diffusion language model and sample from it."
    )
    commands = top.add_subparsers(required=True, metavar="command")
    command.add_options(commands.add_parser("train", help="train on a file or folder of text"), _DATA, _DEVICE)
    _generate_parser(commands.add_parser("generate", help="continue a prompt"))
    _record_parser(commands.add_parser("record", help="write down how a model decodes, to train on its trajectories"))
    _eval_parser(commands.add_parser("eval", help="bits per byte on held-out text, or tasks"))
    bench = commands.add_parser("bench", help="each op against its PyTorch fallback on this machine")
    bench.add_argument("--device", help=_DEVICE)
    bench.set_defaults(run=_bench)
    demo = commands.add_parser(
        "demo", help="three minutes: train on Python's own sources, generate, fill a hole, time the ops"
    )
    demo.add_argument(
        "--seconds", type=float, default=None, help="time to train (default: what fits five minutes in all)"
    )
    demo.add_argument("--out", default=".", help="folder of loss.png and demo.json (default: here)")
    demo.add_argument("--data", default=None, help=_DATA)
    demo.set_defaults(run=_demo)
    return top


_DATA = "a file or folder of UTF-8 text (default: the sources of Python's standard library)"


_DEVICE = "default: cuda if there is one, else cpu"


def _load_torch() -> None:
    """Imports torch. Meanwhile Ctrl-C ends the process, because inside this import it may surface as any error."""
    if "torch" in sys.modules:
        return

    def leave(*_: Any) -> None:
        os.write(2, b"illada: interrupted\n")
        os._exit(130)

    before = signal.signal(signal.SIGINT, leave)
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch  # noqa: F401
    finally:
        gc.freeze()  # what modules hold stays: to look through it, at the end too, takes a quarter of the whole command
        if collects:
            gc.enable()
        signal.signal(signal.SIGINT, before)


def _check_common(options: argparse.Namespace) -> None:
    """Chooses the device, and on a CPU keeps freed memory.

    Raises ValueError for a device that cannot be used, for a seed that torch cannot hold, and for a wrong switch."""
    import torch

    from .devices import usable
    from .heap import keep_freed

    if "device" in options:
        options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        usable(options.device)
    if getattr(options, "device", "cpu") == "cpu":
        keep_freed()
    save_every = getattr(options, "save_every", None)
    if save_every is not None and save_every < 1:
        raise ValueError(f"save_every: expected at least 1 step, got {save_every}; leave it out to save by time")
    seed = getattr(options, "seed", 0)
    if not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed: expected a number from -2**63 to 2**63 - 1, got {seed}")


# ---- generate, eval, bench, demo ----------------------------------------------------------------------------------


def _generate_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="a run's folder, or one of Hugging Face")
    where = p.add_mutually_exclusive_group(required=True)
    where.add_argument("--prompt", action="append", help="may be given several times")
    where.add_argument(
        "--prompts", metavar="FILE", help='JSON lines {"prompt": "..."}, from a file or - (standard input)'
    )
    p.add_argument("--chat", action="store_true", help="apply the folder's chat template to each prompt")
    _bos_option(p)
    p.add_argument("--out", metavar="FILE", help="write JSON lines there, one as soon as a prompt is done")
    p.add_argument("--html", metavar="FILE", help="write a page that replays the denoising of --prompt")
    p.add_argument("--live", action="store_true", help="show masks turning into text")
    p.add_argument("--device", help=_DEVICE)
    p.add_argument(
        "--dtype",
        choices=("fast", "float32", "bfloat16", "float16"),
        default="fast",
        help="fast: bfloat16 where the processor or GPU multiplies it faster, else float32 (default fast)",
    )
    p.add_argument("--weights", choices=("same", "int8", "int4"), help="round the layers' weights, on a CPU")
    p.add_argument("--batch-size", type=int, default=8, help="prompts of --prompts decoded at a time (default 8)")
    _decoding_options(p)
    p.set_defaults(run=_generate)


def _bos_option(p: argparse.ArgumentParser, what: str = "prompts") -> None:
    p.add_argument(
        "--add-bos-token",
        action=argparse.BooleanOptionalAction,
        help=f"begin {what} with the BOS token, once (default: as the folder's tokenizer does by itself)",
    )


def _decoding_options(p: argparse.ArgumentParser) -> None:
    p.add_argument("--max-new-tokens", type=int, default=64)
    p.add_argument("--seed", type=int, default=0)
    group = p.add_argument_group("how to decode, as in illada.GenerationConfig")
    how, masks = group.add_argument, group.add_mutually_exclusive_group().add_argument
    says: dict[str, Any] = {"default": argparse.SUPPRESS}
    how("--sampler", help="a published one: llada, dream-entropy, sdar-dynamic, d3llm ...", **says)
    how("--sampler-option", action="append", metavar="NAME=NUMBER", help="of the sampler, for example tau=0.95", **says)
    how("--steps", type=int, help="passes in all", **says)
    how("--steps-per-block", type=int, **says)
    how("--block-length", type=int, **says)
    how("--threshold", type=float, help="commit what is at least this sure (default: one token a pass)", **says)
    how("--at-least", type=int, metavar="N", help="with --threshold: the N most sure always (default 1)", **says)
    how("--temperature", type=float, help="default 0", **says)
    how("--confidence", choices=("probability", "margin", "neg_entropy", "random", "sampled"), **says)
    how("--confidence-temperature", type=float, **says)
    how("--rank-temperature", type=float, **says)
    how("--top-k", type=int, metavar="K", help="draw from the K most probable", **says)
    how("--top-p", type=float, metavar="P", help="draw from the most probable that have P of the mass", **says)
    how("--min-p", type=float, metavar="P", help="draw from what is P times as probable as the best", **says)
    how("--order", choices=("confidence", "left"), **says)
    how(
        "--edit",
        type=float,
        metavar="TAU",
        help="replace tokens by others that are at least this sure",
        **says,
    )
    how("--remask", type=int, metavar="N", help="take N tokens back in each pass", **says)
    how("--revise-steps", type=int, help="passes that do so (default 16)", **says)
    how("--cache", choices=("none", "prefix", "dual", "vicinity", "interval", "delayed", "block_causal"), **says)
    how("--refresh-every", type=int, metavar="N", help="recompute all keys every N passes", **says)
    how("--vicinity", type=int, metavar="N", help="tokens on each side of the block (default 16)", **says)
    how("--end-early", action="store_true", help="put a stop token over all behind it in its block", **says)
    how("--stop-ids", type=int, nargs="*", help="default: the model's", **says)
    how("--forbid", type=int, nargs="*", metavar="ID", help="never propose these", **says)
    how("--defer", type=int, nargs="*", metavar="ID", help="commit these last", **says)
    how("--logit-bias", action="append", metavar="ID=NUMBER", **says)
    how("--growing-bias", action="append", metavar="ID=NUMBER", help="times the tokens of the blocks before", **says)
    how("--guidance", type=float, help="weight of classifier-free guidance, at least 0", **says)
    says["dest"] = "variable_length"
    masks("--all-masks", action="store_false", help="show all masks at once (LLaDA)", **says)
    masks("--append-blocks", action="store_true", help="show a block's masks when it is reached (iLLaDA)", **says)


def _generate(options: argparse.Namespace) -> int:
    from .prompts import run

    return run(options)


def _record_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="a run's folder, or one of Hugging Face")
    p.add_argument(
        "--prompts", required=True, metavar="FILE", help='JSON lines {"prompt": "..."}, from a file or - (input)'
    )
    p.add_argument("--out", required=True, metavar="FILE", help="JSON lines for illada train --objective trajectory")
    p.add_argument("--draws", type=int, default=1, help="trajectories made of each prompt (default 1)")
    p.add_argument("--keep", type=int, help="how many of them are kept, those of highest bound (default all)")
    p.add_argument("--teacher", metavar="FOLDER", help="a model that takes over from a random pass on, token by token")
    p.add_argument("--chat", action="store_true", help="apply the folder's chat template to each prompt")
    _bos_option(p)
    p.add_argument("--device", help=_DEVICE)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    p.add_argument("--batch-size", type=int, default=8, help="sequences decoded at a time (default 8)")
    _decoding_options(p)
    p.set_defaults(run=_record)


def _record(options: argparse.Namespace) -> int:
    from .prompts import run_record

    return run_record(options)


def _eval_parser(p: argparse.ArgumentParser) -> None:
    p.add_argument("--model", required=True, help="a run's folder, or one of Hugging Face")
    p.add_argument("--data", default=None, help=_DATA + "; its held-out files are measured")
    p.add_argument("--length", type=int, default=128, help="tokens in a window")
    p.add_argument("--draws", type=int, default=1, help="masks drawn for each window")
    p.add_argument("--max-bytes", type=int, default=400_000)
    p.add_argument(
        "--next-token",
        action=argparse.BooleanOptionalAction,
        help="score next tokens on clean rows, which --sampler self-speculation reads (default: for models of joint)",
    )
    _bos_option(p, "documents and contexts")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--device", help=_DEVICE)
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    harness = p.add_argument_group("tasks of lm-evaluation-harness, instead of bits per byte")
    harness.add_argument("--tasks", help="names of tasks or paths of YAML files, with commas between them")
    harness.add_argument("--include-path", help="a folder with more tasks")
    harness.add_argument("--limit", type=float, help="examples of each task, below 1 a share of them")
    harness.add_argument("--num-fewshot", type=int, help="examples shown before each question")
    harness.add_argument("--chat", action="store_true", help="apply the folder's chat template")
    harness.add_argument(
        "--method", help="monte_carlo, confidence or autoregressive (default: what the model was trained for)"
    )
    harness.add_argument("--mask-id", type=int, help="the mask token, where the folder does not name it")
    harness.add_argument("--samples", type=int, default=128, help="masks drawn for each continuation (monte_carlo)")
    p.set_defaults(run=_eval)


def _eval_tasks(options: argparse.Namespace) -> int:
    from .integrations.lm_eval import IlladaLM, evaluate, make_table

    names = ("device", "dtype", "method", "samples", "seed", "mask_id", "add_bos_token")
    scoring = {name: getattr(options, name) for name in names}
    results = evaluate(
        IlladaLM(options.model, **scoring),
        options.tasks.split(","),
        options.include_path,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        apply_chat_template=options.chat,
    )
    print(make_table(results))
    return 0


def _eval(options: argparse.Namespace) -> int:
    if options.tasks:
        return _eval_tasks(options)
    from .tokenizer_config import bos_of
    from .training import runs
    from .training.data import ngram_bits
    from .training.evaluate import bound, first_bytes

    train_documents, held_out = runs.documents(options.data)
    held_out = first_bytes(held_out, options.max_bytes)
    model, tokenizer = runs.open_model(options.model, options.device, options.dtype)
    if options.length > model.config.max_seq_len:
        raise ValueError(
            f"length: expected at most the model's max_seq_len = {model.config.max_seq_len}, got {options.length}"
        )
    following = model.config.next_token if options.next_token is None else options.next_token
    how = {"length": options.length, "draws": options.draws, "seed": options.seed}
    bos = bos_of(Path(options.model), tokenizer, options.add_bos_token)
    found = bound(model, held_out, tokenizer, next_token=following, bos=bos, **how)
    ngrams = ngram_bits(train_documents, held_out)
    print(
        f"{found.bits_per_byte:.4f} ± {found.standard_error:.4f} bits per byte at most "
        f"({found.what}; {found.bytes:,} bytes held out)"
    )
    print(
        f"{ngrams.unigram:.4f} unigram, {ngrams.bigram:.4f} bigram, both fitted on the training files of the same data"
    )
    return 0


def _bench(options: argparse.Namespace) -> int:
    from .bench import table

    print(table(options.device))
    return 0


def _demo(options: argparse.Namespace) -> int:
    from .demo import demo

    return demo(Path(options.out), options.data, options.seconds)
