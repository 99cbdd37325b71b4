"""Runs lm-evaluation-harness on a folder of tasks, once by each of its doors, and prints what it found as JSON.

python lm_eval_run.py MODEL TASKS, with lm_eval importable
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import lm_eval
import torch
from illada import Model, ModelConfig, cli, generate, save
from illada.integrations import lm_eval as adapter
from illada.integrations.lm_eval import IlladaLM, evaluate

from tests.helpers import bos_folder

TASKS = ["local_choice", "local_answer", "local_rolling"]
SCORING = {"method": "monte_carlo", "samples": 4, "seed": 3}
TINY = {"dim": 32, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "head_dim": 16, "ffn_dim": 40, "vocab_size": 259}
TINY |= {"max_seq_len": 64}


def printed(call: Any) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        call()
    return out.getvalue()


def error(call: Any) -> str:
    try:
        call()
    except ValueError as caught:
        return str(caught)
    return ""


def requests(*some: Any) -> list[Any]:
    return [SimpleNamespace(args=one) for one in some]


def samples(results: dict[str, Any]) -> dict[str, Any]:
    """Returns arguments and responses of every request, by task and in the order of the documents."""
    by_task = {}
    for task, some in results["samples"].items():
        some = sorted(some, key=lambda sample: sample["doc_id"])
        by_task[task] = [{"arguments": s["arguments"], "resps": s["resps"]} for s in some]
    return by_task


def truncations(lm: IlladaLM) -> list[Any]:
    """What the settings make of what tasks ask for."""
    asked = [{"top_p": 0.9, "top_k": 5, "min_p": 0.1}, {"top_p": 1, "top_k": -1, "min_p": 0}]
    hot = [lm._generation({**one, "temperature": 0.7})[0] for one in asked]
    cold = [lm._generation({**asked[0], "do_sample": False})[0], lm._generation(asked[0])[0]]
    return [[config.top_p, config.top_k, config.min_p] for config in hot + cold]


def from_left(folder: str) -> dict[str, Any]:
    """What a folder of an autoregressive model without a mask token gives, and what is logged of contexts cut."""
    config = ModelConfig.preset("Qwen2.5-7B", **TINY, mask_id=-1, eos_id=257, pad_id=258)
    torch.manual_seed(1)
    save(Model(config), folder)
    lm = IlladaLM(folder, device="cpu")
    lines: list[str] = []
    logging.getLogger("illada.integrations.lm_eval").warning = lambda text, *values: lines.append(text % values)  # type: ignore[method-assign]
    greedy = {"until": ["\n"], "max_gen_toks": 5, "do_sample": False}
    long = requests(("x" * 80, " yes"), ("a", " yes"), ("", "b"))
    found = {"method": lm.scoring["method"], "pairs": lm.loglikelihood(long, True), "lines": lines}
    found["rolling"] = lm.loglikelihood_rolling(requests(("z" * 150,)), True)
    found["answers"] = lm.generate_until(requests(("y" * 80, greedy), ("a", greedy)), True)
    found["too long"] = error(lambda: lm.loglikelihood(requests(("a", "b"), ("c", "d" * 65)), True))
    found["mask_id"] = IlladaLM(folder, device="cpu", mask_id=256).model.config.mask_id
    return found


def joint(folder: str) -> dict[str, Any]:
    """A model whose clean rows predict is read from left to right, unless a method says otherwise."""
    torch.manual_seed(1)
    save(Model(ModelConfig.preset("demo", **TINY, causal_block=1, next_token=True)), folder)
    pair = requests(("ab", "cd"))
    lms = [IlladaLM(folder, device="cpu"), IlladaLM(folder, device="cpu", method="confidence")]
    found: dict[str, Any] = {lm.scoring["method"]: lm.loglikelihood(pair, True)[0][0] for lm in lms}
    found["passes"] = [passes(lms[0]), passes(lms[0], answer(lms[0])[1])]
    asked = {"until": ["\n"], "max_gen_toks": 5}
    found["answers"] = [lm.generate_until(requests(("ab", asked), ("", asked)), True) for lm in lms]
    found["hot"] = error(lambda: lms[0].generate_until(requests(("ab", {**asked, "temperature": 0.5})), True))
    return found


def answer(lm: IlladaLM, *until: str) -> str:
    found: str = lm.generate_until(requests(("ab", {"until": list(until), "max_gen_toks": 30})), True)[0]
    return found


def passes(lm: IlladaLM, *until: str) -> int:
    """Forward passes of `answer`."""
    counted = []
    with mock.patch.object(adapter, "generate", lambda *a: counted.append(generate(*a)) or counted[-1]):
        answer(lm, *until)
    return sum(done.forward_passes for done in counted)


def beside(folder: str) -> list[dict[str, Any]]:
    """What we and the harness's own model find of a folder whose tokenizer writes BOS, for each add_bos_token."""
    from lm_eval.models.huggingface import HFLM

    bos_folder.write(Path(folder))
    Path(folder, "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    pairs = requests(("a b", " on and"), ("", "on and"), ("x ", "yes"), ("on " * 40, "and"))
    asked = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    chat = [{"role": "user", "content": "on"}]
    found = []
    for add in (None, True, False):
        ours = IlladaLM(folder, device="cpu", add_bos_token=add)
        theirs = HFLM(pretrained=folder, device="cpu", dtype="float32", add_bos_token=add)
        both: dict[str, Any] = {"bos": ours.bos}
        for name, lm in (("ours", ours), ("theirs", theirs)):
            rolling = [("on and on" * 30,)]
            if lm is theirs and lm_eval.__version__ >= "0.5":
                rolling = [("", text) for (text,) in rolling]
            both[name] = {
                "pairs": lm.loglikelihood(pairs, True),
                "rolling": lm.loglikelihood_rolling(requests(*rolling), True),
                "answers": lm.generate_until(requests(("a b", asked), ("zq", asked)), True),
            }
            prompt = lm.apply_chat_template(chat)
            both[name]["chat"] = lm.generate_until(requests((prompt, asked)), True)
            both[name]["chat pairs"] = lm.loglikelihood(requests((prompt, "and")), True)
        found.append(both)
    return found


def run(model: str, tasks: str) -> dict[str, Any]:
    lm = IlladaLM(model, device="cpu", **SCORING)
    found = evaluate(lm, TASKS, tasks, bootstrap_iters=0)
    chat = evaluate(
        IlladaLM(model, device="cpu", **SCORING), TASKS[:2], tasks, bootstrap_iters=0, limit=1, apply_chat_template=True
    )
    options = [f"{name}={value}" for name, value in SCORING.items()]
    sys.argv = ["-", "--model_args", ",".join([f"pretrained={model}", *options]), "--tasks", TASKS[0]]
    sys.argv += ["--include_path", tasks, "--device", "cpu"]
    module = printed(lambda: runpy.run_module("illada.integrations.lm_eval", run_name="__main__"))
    command = ["eval", "--model", model, "--tasks", TASKS[0], "--include-path", tasks, "--device", "cpu"]
    command += [part for name, value in SCORING.items() for part in (f"--{name}", str(value))]
    return {
        "results": {task: dict(values) for task, values in found["results"].items()},
        "samples": samples(found),
        "chat": samples(chat),
        "module": module,
        "command": printed(lambda: cli.main(command)),
        "unknown model_args": error(lambda: IlladaLM(model, device="cpu", blok_length=4)),
        "guidance": error(lambda: IlladaLM(model, device="cpu", guidance=-0.5)),
        "unknown gen_kwargs": error(
            lambda: evaluate(lm, TASKS[1:2], tasks, gen_kwargs={"typical_p": 0.5}, bootstrap_iters=0)
        ),
        "truncations": truncations(lm),
        "from_left": from_left(f"{model}-from-left"),
        "joint": joint(f"{model}-joint"),
        "beside": beside(f"{model}-beside"),
        "too long": error(lambda: evaluate(lm, TASKS[1:2], tasks, gen_kwargs={"max_gen_toks": 99}, bootstrap_iters=0)),
    }


if __name__ == "__main__":
    print("\n" + json.dumps(run(*sys.argv[1:]), default=str))
