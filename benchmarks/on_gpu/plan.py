"""Plans what a run on a GPU does, in which order, for how many seconds: by the worth of each answer.

A stage ends at the latest when those after it would lose time of theirs, so that each gets its seconds whatever the
earlier ones did; what one leaves over goes to the next.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HARDWARE = "tests/cuda_on_cpu/test_hardware.py"
OPS = ("attention", "masked_loss", "masked_loss_from_logits", "unmask", "unmask_from_logits")  # in CUDA and Triton
TEST_PROCESSES = 10

FORWARD = (
    "full_8k_kv8,block_diffusion_4k_b32_kv8,full_8k_kv32,full_2k_kv8,packed_16k_kv8,full_16k_kv8,cached_16k_q32_b16_kv8,"
    "cached_4k_q32_b1_kv8,full_8k_d64,full_8k_d256,full_8k_d96,full_1k_kv8,block_diffusion_4k_b4_kv8"
)
BACKWARD = (
    "full_8k_kv8 backward,block_diffusion_4k_b32_kv8 backward,full_8k_kv32 backward,full_2k_kv8 backward,"
    "packed_16k_kv8 backward,full_8k_d64 backward,full_8k_d256 backward"
)
UNMASK = (
    "entropy_1x32_v126k_t1,entropy_2x32_v126k_t1,hidden_4x32_v126k_t0,hidden_4x32_v126k_t1,hidden_8x32_v126k_t0,"
    "hidden_16x32_v126k_t0,hidden_64x32_v126k_t0,hidden_64x32_v126k_t1,selection_32x1024,top_p0.9_2x32_v126k_t1,"
    "top_k50_2x32_v126k_t1,renoise_1x256_v126k_t1"
)
LOSS = "half_v126k,half_v126k_no_grad,half_v126k_minimum,tenth_v126k,half_v155k"
TRITON = (
    "full_8k_kv8,block_diffusion_4k_b32_kv8,full_8k_kv8 backward,block_diffusion_4k_b32_kv8 backward,half_v126k,"
    "tenth_v126k,entropy_2x32_v126k_t1,hidden_16x32_v126k_t0,layer_1x32,layer_32x32"
)
MEASURED = ("attention_fwd", "attention_bwd", "masked_loss", "unmask", "layer")
# of profile.py, by the kernels that they launch
PROFILED = "attention_fwd|attention_bwd_keys|attention_bwd_queries|attention_bwd_fused|head_kernel|rows_gradients"


@dataclass(frozen=True)
class Settings:
    """Holds what the command line says of the measurements."""

    rounds: int = 7
    case_seconds: float = 1.0
    all_peers: bool = False
    cases: str = ""  # instead of the plan's
    ours: str = ""  # instead of the plan's


@dataclass(frozen=True)
class Worker:
    """A process of a stage. One that writes the journal is watched item by item, and started again without what hung or
    died, at most `restarts` times; one that has written nothing `idle` seconds after its start has hung on the way."""

    name: str
    command: tuple[str, ...]
    journaled: bool = True
    idle: float = 40.0
    restarts: int = 8
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    name: str
    seconds: float
    about: str
    workers: tuple[Worker, ...]


def python(*arguments: str) -> tuple[str, ...]:
    return (sys.executable, "-m", *arguments)


def builds() -> tuple[Worker, ...]:
    modules = {"build": "illada_kernels._build", "variants": "benchmarks.on_gpu.variants"}
    return tuple(Worker(name, python(module), journaled=False) for name, module in modules.items())


def benchmark(
    name: str, ops: Iterable[str], cases: str, out: Path, settings: Settings, ours: str, limit: float = 15
) -> Worker:
    """Plans one process that measures `cases`, in order. `limit`: seconds a call, of quick peers."""
    command = ["benchmarks.run", "--op", ",".join(ops), "--device", "cuda", "--cases", settings.cases or cases]
    command += ["--journal", str(out / "journal.jsonl"), "--by", name, "--rounds", str(settings.rounds)]
    command += ["--seconds", str(settings.case_seconds), "--ours", settings.ours or ours]
    command += [
        "--peers",
        "all" if settings.all_peers else "quick",
        "--limit",
        f"{max(60, limit) if settings.all_peers else limit:g}",
    ]
    return Worker(name, python(*command))


def tests(name: str, place: str, processes: int, *options: str, limit: float = 15.0) -> tuple[Worker, ...]:
    quiet = ("-q", "-rs", "-p", "no:cacheprovider", "-p", "tests.gpu.journal_plugin")
    command = python("pytest", place, *quiet, *options)
    env = {"ILLADA_STAGE": name, "ILLADA_TEST_LIMIT": f"{limit:g}"}
    return tuple(Worker(f"{name} {i}", command, env=env, idle=60.0) for i in range(processes))


def selftest(op: str, backend: str, out: Path) -> Worker:
    name = f"selftest {op} {backend}"
    journal = ("--journal", str(out / "journal.jsonl"), "--by", name)
    return Worker(name, python("benchmarks.on_gpu.selftest", op, backend, *journal), restarts=0)


def profile(out: Path) -> Worker:
    """Plans Nsight Compute, which replays a kernel for each group of counters; the clocks stay as they are."""
    sections = ("--section", "SpeedOfLight", "--section", "WarpStateStats")
    kernels = ("--kernel-name", f"regex:{PROFILED}", "--csv", "--log-file", str(out / "profile.csv"))
    ncu = ("ncu", "--clock-control", "none", *sections, *kernels)
    return Worker("profile", (*ncu, *python("benchmarks.on_gpu.profiled")), journaled=False)


def plan(out: Path, settings: Settings | None = None) -> list[Stage]:
    """Returns all stages, 520 seconds together, in order."""
    settings = settings or Settings()
    journal = ("--journal", str(out / "journal.jsonl"))
    smoke = Worker("smoke", python("benchmarks.on_gpu.smoke", *journal))
    compare = tests("compare", HARDWARE, 1, limit=25.0)
    small = tests("tests", "tests/gpu", TEST_PROCESSES, "-m", "not large")
    large = tests("large", "tests/gpu", 1, "-m", "large", limit=30.0)

    def selftests(backend: str) -> tuple[Worker, ...]:
        return tuple(selftest(op, backend, out) for op in (*OPS, *(["layer"] if backend == "triton" else [])))

    def measured(name: str, seconds: float, about: str, ops: Iterable[str], cases: str, ours: str = "cuda") -> Stage:
        return Stage(name, seconds, about, (benchmark(name, ops, cases, out, settings, ours),))

    return [
        Stage("build", 60, "the extension, for this GPU alone; variants that are only measured", builds()),
        Stage("smoke", 30, "every kernel once; the emulator of CUDA against the GPU", (smoke, *compare)),
        Stage("tests", 90, "tests/gpu but the large; the doctor's selftests of CUDA", (*selftests("cuda"), *small)),
        measured("forward", 65, "attention forward", ["attention_fwd"], FORWARD),
        measured("backward", 50, "attention backward alone, both variants", ["attention_bwd"], BACKWARD),
        measured("unmask", 50, "decoding steps", ["unmask"], UNMASK),
        measured("loss", 50, "masked losses with gradients and without", ["masked_loss"], LOSS),
        Stage("profile", 35, "where the clocks of the main kernels go, by Nsight Compute", (profile(out),)),
        measured("triton", 50, "two cases an op with Triton's kernels", MEASURED, TRITON, "triton"),
        Stage("triton selftests", 15, "the doctor's selftests of Triton", selftests("triton")),
        Stage("large", 25, "the tests that need tens of GiB, one at a time", large),
    ]


def more(out: Path, settings: Settings | None = None) -> list[Stage]:
    """Plans what runs by name only: every case that the suites have."""
    settings = settings or Settings()
    everything = benchmark("everything", MEASURED, "", out, settings, "all")
    models = benchmark(
        "models", ("generate", "train"), "", out, settings, "all", limit=60
    )  # a generation takes seconds
    return [
        Stage("everything", 3600, "every case of every op", (everything,)),
        Stage("models", 900, "the thin model: generate and train", (models,)),
    ]


def chosen(names: str, stages: list[Stage], extra: list[Stage], done: Callable[[str], bool]) -> list[Stage]:
    """Returns the stages that `names` asks for: some with commas, "all", or "rest": the build, and what was not `done`
    before.

    Raises ValueError for a name that there is not."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {stage.name: stage for stage in (*stages, *extra)}
    if unknown := [name for name in wanted if name not in (*known, "all", "rest")]:
        raise ValueError(f"--stage: expected all, rest or some of {', '.join(known)}; got {', '.join(unknown)}")
    if "all" in wanted:
        wanted += [stage.name for stage in stages]
    if "rest" in wanted:
        wanted += [stage.name for stage in stages if stage.name == "build" or not done(stage.name)]
    return [stage for name, stage in known.items() if name in wanted]


def deadlines(stages: list[Stage], seconds: float) -> list[float]:
    """Returns when each stage ends at the latest, counted from the start: the later ones keep their seconds, or, if
    `seconds` are fewer than the stages want together, their shares of them."""
    total = sum(stage.seconds for stage in stages)
    scale = min(1.0, seconds / total) if total else 1.0
    later = [sum(stage.seconds for stage in stages[i + 1 :]) * scale for i in range(len(stages))]
    return [seconds - kept for kept in later]
