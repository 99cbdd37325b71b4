"""Decoder: sequences that come and go give what `generate` gives each of them; what a pass waits for and allocates."""

from __future__ import annotations

import dataclasses
import gc
import math

import pytest
import torch
from illada import Decoder, DecodingError, Generation, GenerationConfig, PromptError, generate
from illada.decoding.replay import LateFlag, Replay
from illada.decoding.samplers import ALONE, SAMPLERS
from torch.utils._python_dispatch import TorchDispatchMode

from illada_kernels import Edit, EntropyBound, Factor, Threshold, TopK
from tests.helpers.models import model_of
from tests.helpers.stand_in_graphs import stand_in, tensors_of

pytestmark = pytest.mark.usefixtures("one_thread")
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5, 8, 9], [2, 7], [1, 8, 2, 8, 1, 8, 2, 8, 4], [40, 30, 20], [], [11]]


def settings(model, **changes) -> GenerationConfig:
    block = model.config.causal_block or 4
    common = {"max_new_tokens": 10, "block_length": block, "stop_ids": (), "seed": 5, "variable_length": True}
    return GenerationConfig(**{**common, **changes})


HOW = {
    "threshold": {"rule": Threshold(0.3)},
    "sampled": {"rule": Factor(1.0), "temperature": 1.0},
    "edit": {"rule": Threshold(0.1), "revise": Edit(0.1), "revise_steps": 3},
    "stop": {"rule": TopK(2), "stop_ids": tuple(range(12))},
    "stop_when": {"rule": TopK(2), "stop_when": lambda ids: any(i < 12 for i in ids)},
    "whole": {"rule": Threshold(0.3), "variable_length": False},
    "guided": {"rule": Threshold(0.3), "guidance": 0.5},
    "growing": {"rule": TopK(1), "growing_bias": {3: 0.4, 8: 0.3}},
    "sampler": {"sampler": "remdm-conf", "variable_length": None, "block_length": None, "steps": 6},
}


# every way with a cache that leaves a sequence's keys alone and one that does not, every cache with some ways
JOINS = [("demo", cache, how) for cache in ("dual", "interval") for how in HOW]
JOINS += [("demo", cache, how) for cache in ("none", "prefix", "vicinity") for how in ("threshold", "whole")]
JOINS += [("Dream-7B", cache, how) for cache in ("dual", "interval") for how in ("threshold", "guided")]
JOINS += [("SDAR-8B", "block_causal", how) for how in HOW if how != "sampler"] + [("SDAR-8B", "none", "threshold")]
JOINS += [("Qwen2.5-7B", "block_causal", how) for how in ("threshold", "sampled", "stop", "guided")]


def each(done: Generation) -> list[tuple[list[int], bool, int, int]]:
    return list(zip(done.tokens, done.stopped, done.passes, done.filled))


@pytest.mark.parametrize("preset, cache, how", JOINS)
def test_a_sequence_gives_what_it_gives_alone_whenever_it_joins(preset, cache, how):
    model = model_of(preset)
    changes = {**HOW[how], "cache": cache, "refresh_every": 3 * (cache == "interval")}
    config = settings(model, **changes)
    decoder = Decoder(model, config, slots=3, max_length=24)
    done = {}
    for prompt in PROMPTS[:4]:
        decoder.submit(prompt)
    for _ in range(3):  # others come while these are decoded
        assert decoder.step()
    for prompt in PROMPTS[4:]:
        decoder.submit(prompt)
    while decoder.step():
        for finished in decoder.collect():
            assert finished.ticket not in done
            done[finished.ticket] = finished
    done.update({finished.ticket: finished for finished in decoder.collect()})
    assert sorted(done) == list(range(len(PROMPTS)))
    found = [(one.tokens, one.stopped, one.passes, one.filled) for _, one in sorted(done.items())]
    assert found == each(generate(model, PROMPTS, config))
    for ticket in (2, 7):  # that any sequence of a batch is, test_generation.py says
        alone = dataclasses.replace(config, seed=5 + ticket)
        assert found[ticket : ticket + 1] == each(generate(model, PROMPTS[ticket : ticket + 1], alone))
    assert not decoder.step() and decoder.collect() == []


def test_a_sequence_joins_where_another_ends_and_not_after_the_last():
    model = model_of("demo")
    decoder = Decoder(model, settings(model, max_new_tokens=4, rule=TopK(4)), slots=2, max_length=16)
    for prompt in PROMPTS[1:5]:
        decoder.submit(prompt)
    passes = 0
    while decoder.step():
        passes += 1
    assert passes == 2  # four sequences of one pass each, two at a time


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"slots": 0}, "slots: expected an int of at least 1, got 0"),
        ({"max_length": 3}, r"max_length: expected 10 \(max_new_tokens\) to 64 \(max_seq_len\), got 3"),
        ({"max_length": "64"}, "max_length: expected 10 .* got '64'"),
        ({"max_length": 65}, "max_length: expected 10 .* got 65"),
    ],
)
def test_rooms_that_do_not_fit_are_refused(changes, message):
    model = model_of("demo")
    with pytest.raises(PromptError, match=message):
        Decoder(model, settings(model), **changes)


def test_settings_and_prompts_that_do_not_fit_are_refused():
    model = model_of("demo")
    for changes, message in (
        ({"rule": Threshold(torch.tensor([0.3, 0.5]))}, "rule: expected numbers or 0-d tensors in a Decoder"),
        ({"rule": torch.ones(10, 8, dtype=torch.int64)}, "rule: expected numbers or 0-d tensors in a Decoder"),
    ):
        with pytest.raises(PromptError, match=message):
            Decoder(model, settings(model, **changes))
    decoder = Decoder(model, settings(model), max_length=16)
    with pytest.raises(PromptError, match="7 tokens and max_new_tokens = 10 exceed max_length = 16; shorten"):
        decoder.submit([1] * 7)
    with pytest.raises(PromptError, match=r"expected no mask_id \(49\)"):
        decoder.submit([49])
    assert decoder.submit([1] * 6) == 0  # what was refused took no ticket


@pytest.mark.parametrize("preset", ["demo", "Dream-7B", "SDAR-8B", "Qwen2.5-7B"])
@pytest.mark.parametrize("variable_length", [True, False])
def test_no_more_room_is_needed_than_one_sequence_needs(preset, variable_length):
    """The longest ends while a short one that came late goes on; one more comes when columns have moved."""
    model = model_of(preset)
    prompts = [[1] * 13, [6, 7], [5, 3, 5], [2]]
    config = settings(model, rule=TopK(2), max_new_tokens=12, variable_length=variable_length)
    decoder = Decoder(model, config, slots=2, max_length=25)
    decoder.submit(prompts[0])
    each, passes = 12 if preset == "Qwen2.5-7B" else 6, 0
    later = {each * 2 // 3: prompts[1], each * 7 // 5: prompts[2], each * 11 // 5: prompts[3]}
    while decoder.step():
        passes += 1
        if passes in later:
            decoder.submit(later.pop(passes))
    assert not later
    done = decoder.collect()
    assert sorted(one.ticket for one in done) == [0, 1, 2, 3]
    for one in done:
        alone = generate(model, [prompts[one.ticket]], dataclasses.replace(config, seed=5 + one.ticket))
        assert (one.tokens, one.passes) == (alone.tokens[0], alone.passes[0])


def test_a_model_of_nan_names_the_ticket():
    model = model_of("demo")
    with torch.no_grad():
        model.norm.weight[3] = math.nan
    decoder = Decoder(model, settings(model, rule=TopK(1)))
    decoder.submit([1])
    with pytest.raises(RuntimeError, match="ticket 0: 10 positions stayed masked"):
        while decoder.step():
            pass


@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_sequence_of_nan_leaves_the_others_alone(slots):
    model = model_of("Dream-7B")
    with torch.no_grad():
        model.embed.weight[7] = math.nan
    prompts = [[1, 7], [7], [4, 5, 6], [9], [8, 8]]
    config = settings(model, rule=TopK(2))
    decoder, named = Decoder(model, config, slots=slots), []
    for prompt in prompts:
        decoder.submit(prompt)
    while True:
        try:
            if not decoder.step():
                break
        except DecodingError as error:
            named.append(str(error).split(":")[0])
    assert named == ["ticket 0", "ticket 1"]
    done = {one.ticket: one.tokens for one in decoder.collect()}
    seeds = {b: dataclasses.replace(config, seed=5 + b) for b in (2, 3, 4)}
    assert done == {b: generate(model, [prompts[b]], seeds[b]).tokens[0] for b in seeds}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_decoder_whose_pass_was_broken_off_says_so(error):
    model, passes = model_of("demo"), []

    def rule(now):
        passes.append(now)
        if len(passes) == 7:
            raise error
        return TopK(4)

    decoder = Decoder(model, settings(model, rule=rule, block_length=10), slots=1)
    for prompt in ([1, 2], [3], [4]):
        decoder.submit(prompt)
    with pytest.raises(error):
        while decoder.step():
            pass
    for _ in range(2):
        with pytest.raises(DecodingError, match=f"step: {error.__name__} has ended a pass half way; submit what"):
            decoder.step()
    assert [done.ticket for done in decoder.collect()] == [0, 1] and len(passes) == 7


# ---- what a pass costs ---------------------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Counts operators that read a value on the host, bring one from there, or return new memory."""

    READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "item")
    FROM_HOST = ("lift_fresh",)  # torch.tensor(...)

    def __init__(self):
        super().__init__()
        self.reads = self.copies = self.allocations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.reads += name in self.READS
        self.copies += name in self.FROM_HOST
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
        self.allocations += any(t.untyped_storage().data_ptr() not in given for t in tensors_of(result))
        return result


@pytest.fixture
def small_heap():
    """Keeps what other tests have left out of the garbage collector's sight: to walk it takes most of a second."""
    gc.collect()
    gc.freeze()  # for good, as what was imported is: an unfreeze would be of all


def living() -> int:
    gc.collect()
    return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())


def state_of(decoder: Decoder) -> list[int]:
    holders = (decoder.loop, decoder.loop.batch)
    return [t.data_ptr() for holder in holders for t in vars(holder).values() if isinstance(t, torch.Tensor)]


RULES = {
    "schedule": {"steps_per_block": 6},
    "threshold": {"rule": Threshold(1.0)},
    "factor": {"rule": Factor(0.0)},
    "entropy": {"rule": EntropyBound(0.0)},
    "edit": {"rule": Threshold(1.0), "revise": Edit(0.2)},
    "counts": {"rule": torch.tensor([1, 1, 2, 1, 1, 2])},
    "sdar": {"sampler": "sdar-dynamic", "sampler_options": {"tau": 1.0}, "steps_per_block": 6},
    "biased": {"rule": Threshold(1.0), "logit_bias": {3: 1.0}},
    "growing": {"rule": Threshold(1.0), "growing_bias": {3: 1.0}},
    "guided": {"rule": Threshold(1.0), "guidance": 0.5},
    "early": {"rule": Threshold(1.0), "stop_ids": 46, "end_early": True},
    "origin": {"sampler": "dream-origin", "steps": 12, "variable_length": None},
    "remdm": {"sampler": "remdm", "steps": 8, "variable_length": None},
    "remdm-conf": {"sampler": "remdm-conf", "steps": 8, "variable_length": None},
    "d3llm": {"sampler": "d3llm", "sampler_options": {"length": 4, "entropy": 0.0}, "variable_length": None}
    | {"max_new_tokens": 16, "block_length": 16},
}


def begun(preset: str, rule: str, cache: str) -> Decoder:
    """A decoder of two sequences."""
    model = model_of(preset)
    length = {} if preset == "SDAR-8B" else {"block_length": 8}
    refresh = {"refresh_every": 2} if cache in ("vicinity", "interval") else {}
    config = settings(model, **{**length, "max_new_tokens": 8, "cache": cache, **refresh, **RULES[rule]})
    decoder = Decoder(model, config, slots=2, max_length=24)
    decoder.submit([1, 2, 3, 4])
    decoder.submit([4, 5, 6, 7])
    return decoder


# every rule, every cache, and every sampler whose loop this is
WATCHED = [("demo", rule, cache) for rule in RULES for cache in ("none", "interval")]
WATCHED += [("demo", "threshold", cache) for cache in ("prefix", "dual", "vicinity")]
NAMED = [name for name in SAMPLERS if name not in (*ALONE, *(how.get("sampler") for how in RULES.values()))]
for name in NAMED:
    RULES[name] = {"sampler": name, "variable_length": None, "max_new_tokens": 16, "block_length": 16}
    RULES[name] |= {"steps": 16} if name.startswith(("dream", "remdm")) else {}
WATCHED += [("demo", name, "dual") for name in NAMED]
WATCHED += [("SDAR-8B", "threshold", "block_causal"), ("Dream-7B", "threshold", "dual")]


@pytest.mark.parametrize("preset, rule, cache", WATCHED)
def test_no_pass_reads_a_value_copies_one_from_the_host_or_leaves_a_tensor_behind(preset, rule, cache, small_heap):
    decoder = begun(preset, rule, cache)
    decoder.step()
    before, addresses = living(), state_of(decoder)
    for _ in range(3):
        with Watch() as seen:
            assert decoder.step()
        assert (seen.reads, seen.copies) == (0, 0)
        assert living() == before
    assert state_of(decoder) == addresses  # the state stays where a captured graph would look for it


def test_a_pass_with_delayed_keys_reads_one_number():
    """Where its window begins, which depends on what is full."""
    decoder = begun("demo", "d3llm", "delayed")
    assert decoder.step()
    for _ in range(3):
        with Watch() as seen:
            assert decoder.step()
        assert seen.reads == 1


@pytest.mark.parametrize("sampler", ALONE)
def test_no_pass_of_a_loop_of_its_own_reads_a_value_or_copies_one_from_the_host(sampler):
    model, seen = model_of("demo"), []
    more = {"steps_per_block": 5, "sampler_options": {"calm": 0.0}} if sampler == "canvas" else {}
    config = GenerationConfig(sampler=sampler, max_new_tokens=8, block_length=8, stop_ids=(47,), seed=5, **more)
    with Watch() as watch:
        generate(model, PROMPTS[:3], config, lambda step: seen.append((watch.reads, watch.copies)))
    assert len(seen) > 2 or sampler == "draft"
    assert len(set(seen)) == 1


@pytest.mark.parametrize("preset, rule, cache", [w for w in WATCHED if w[0] == "demo"])
def test_a_pass_from_a_graph_allocates_nothing(preset, rule, cache, monkeypatch):
    """What runs beside the graph fills numbers in place: where the window is, and whether all have ended."""
    log = stand_in(monkeypatch)
    decoder = begun(preset, rule, cache)
    for _ in range(5):  # each of two shapes twice
        assert decoder.step()
    log.clear()
    with Watch() as seen:
        assert decoder.step()
    assert log == ["replay"] and (seen.reads, seen.copies, seen.allocations) == (0, 0, 0)


@pytest.mark.parametrize("lag", [0, 1])
def test_a_late_flag_brings_what_was_written_before_the_last(lag):
    flag = LateFlag(torch.device("cpu"), lag)
    assert not flag.read()
    for value, expected in zip([True, False, False, True, True], [True, False, False, True, True]):
        flag.write(torch.tensor(value))
        last = flag.read()
        assert lag or last == expected
    written = [True, False, True, True]
    flag.reset()
    seen = []
    for value in written:
        flag.write(torch.tensor(value))
        seen.append(flag.read())
    assert seen == [*[False] * lag, *written][: len(written)]


@pytest.mark.parametrize("how", HOW)
def test_a_stop_that_comes_late_costs_passes_and_changes_nothing_else(how, monkeypatch):
    model = model_of("demo")
    config = settings(model, **HOW[how])
    at_once = generate(model, PROMPTS, config)
    original = LateFlag.__init__
    monkeypatch.setattr(LateFlag, "__init__", lambda self, device: original(self, device, lag=1))
    late = generate(model, PROMPTS, config)
    assert (late.tokens, late.passes, late.stopped) == (at_once.tokens, at_once.passes, at_once.stopped)
    assert at_once.forward_passes <= late.forward_passes <= at_once.forward_passes + 3  # one a block


def test_a_pass_is_captured_at_its_second_call_and_replayed_from_the_third(monkeypatch):
    """A stand-in for CUDA graphs: capturing records the function, replaying runs it again."""
    log = []

    class Graph:
        def replay(self):
            log.append("replay")

    class Capture:
        def __init__(self, graph, pool):
            assert pool == "pool"

        def __enter__(self):
            log.append("capture")

        def __exit__(self, *error):
            log.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    calls = []
    replay = Replay(lambda key: calls.append(key) or key, torch.device("cuda"))
    assert [replay(key) for key in ("a", "a", "a", "b", "a", "b")] == ["a", "a", "a", "b", "a", "b"]
    assert calls == ["a", "a", "b", "b"]  # of each kind one eager and one that is captured
    assert log == ["capture", "captured", "replay", "replay", "replay", "capture", "captured", "replay"]
    on_cpu = Replay(lambda: calls.append("cpu"), torch.device("cpu"))
    on_cpu(), on_cpu(), on_cpu()
    assert calls[4:] == ["cpu"] * 3
