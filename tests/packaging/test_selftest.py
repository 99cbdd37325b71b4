"""The selftest, and what it lets into the default order."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import illada_kernels
from illada_kernels import _dispatch, _proven, _selftest, doctor
from illada_kernels.ops import OPS


def test_selftest_passes_for_every_backend_of_this_machine(python, tmp_path):
    one = {"XDG_CACHE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = python("-m", "illada_kernels", "doctor", "--selftest", "--json", **one)
    found = json.loads(done.stdout)
    failures = [(row["op"], row["backend"], row["device"], row) for row in found["selftest"] if not row["passed"]]
    assert not failures and done.returncode == 0
    tested = {(row["op"], row["backend"], row["device"]) for row in found["selftest"]}
    available = {
        (op, row["backend"], device)
        for op, rows in found["ops"].items()
        for row in rows
        for device in row.get("devices", ())
        if row["backend"] != "reference"
    }
    assert tested == available and all(len(row["cases"]) >= 9 for row in found["selftest"])


def off(value: torch.Tensor) -> torch.Tensor:
    return value * 1.05


def swap(tokens: torch.Tensor) -> None:
    tokens[0, 0] += 1


@pytest.mark.parametrize("op", OPS)
def test_selftest_notices_a_backend_that_is_a_little_wrong(op, monkeypatch, capsys):
    if op == "layer":
        return a_selftest_notices_a_norm_that_is_a_little_wrong(monkeypatch, capsys)
    right = getattr(illada_kernels, op)

    def wrong(*arguments, **options):
        result = right(*arguments, **{**options, "backend": "reference"})
        if options["backend"] == "reference":
            return result
        if op == "attention":
            return off(result[0]), result[1]
        if op.startswith("masked_loss"):
            return off(result)
        swap(arguments[1 if op.endswith("logits") else 2])
        return result

    monkeypatch.setitem(illada_kernels.__dict__, op, wrong)
    _selftest.main(op, "cpu", "cpu")
    assert json.loads(capsys.readouterr().out)["passed"] is False


def a_selftest_notices_a_norm_that_is_a_little_wrong(monkeypatch, capsys):
    from illada_kernels.ops.layer import cpu

    for name, of in (("norm", lambda r: (r[0], off(r[1]))), ("rope", off), ("swiglu", off)):
        with monkeypatch.context() as patch:
            right = getattr(cpu, name)
            patch.setattr(cpu, name, lambda *a, right=right, of=of: of(right(*a)))
            _selftest.main("layer", "cpu", "cpu")
        failed = {
            case["case"].split()[0].strip(",") for case in json.loads(capsys.readouterr().out)["cases"] if case["error"]
        }
        assert failed == {name}


def test_a_selftest_process_that_dies_is_a_failure(monkeypatch, capsys):
    row = {"backend": "cuda", "reason": None, "opt_in": "not yet run on a GPU", "devices": ["cuda"], "place": {}}
    found = {"ops": {op: [row] if op == "unmask" else [] for op in OPS}}
    monkeypatch.setattr(doctor, "report", lambda: found)
    dead = [{"passed": True, "cases": []}], "died of SIGSEGV"
    monkeypatch.setattr(doctor, "child", lambda arguments, timeout: dead)
    assert doctor.main(["doctor", "--selftest", "--json"]) == 1
    (outcome,) = json.loads(capsys.readouterr().out)["selftest"]
    assert outcome["passed"] is False and outcome["error"] == "died of SIGSEGV"


def test_a_selftest_that_dies_hangs_or_raises_ends_no_other(monkeypatch, capfd):
    def main(op, backend, device):
        if op == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        if op == "hangs":
            time.sleep(60)
        if op == "raises":
            raise RuntimeError("no kernel")
        print(json.dumps({"passed": True, "cases": [op]}))

    which = [(op, "cpu", "cpu") for op in ("passes", "dies", "hangs", "raises", "passes too")]

    def child(arguments, timeout):
        assert arguments[:3] == ["illada_kernels._selftest", "--each", "1"] and len(arguments) == 3 + 3 * len(which)
        _selftest.each(which, 1)
        return [json.loads(line) for line in capfd.readouterr().out.splitlines()], None

    monkeypatch.setattr(_selftest, "main", main)
    monkeypatch.setattr(doctor, "child", child)
    monkeypatch.setattr(doctor, "SELFTEST_SECONDS", 1)
    outcomes = doctor.selftest_in_forks(which)
    assert [(o["op"], o["passed"], o.get("error")) for o in outcomes] == [
        ("passes", True, None),
        ("dies", False, "died of SIGKILL"),
        ("hangs", False, "did not end within 1 s"),
        ("raises", False, "RuntimeError: no kernel"),
        ("passes too", True, None),
    ]
    monkeypatch.setattr(doctor, "child", lambda *_: ([], "died of SIGILL"))  # while it imports torch
    assert {(o["passed"], o["error"]) for o in doctor.selftest_in_forks(which)} == {(False, "died of SIGILL")}


# ---- what a passed selftest opens -----------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A machine with a GPU, as far as the memory of selftests can tell; `card["name"]` may change."""
    facts = {"name": "H200, driver 1", "kernel": "k1"}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_proven, "machine", lambda: facts["name"])
    monkeypatch.setattr(_proven, "kernel", lambda op, backend: f"{facts['kernel']} {op} {backend}")
    _proven.proven.cache_clear()
    yield facts
    _proven.proven.cache_clear()


def chosen(device: str) -> str:
    module = SimpleNamespace(available=lambda: None, supports=lambda problem: None)
    order = (
        _dispatch.Backend("cuda", ("cuda",), lambda: module, opt_in="not yet run on a GPU"),
        _dispatch.Backend("reference", None, lambda: module),
    )
    return _dispatch.choose("attention", order, device, None).name


def test_a_kernel_enters_the_default_order_when_its_selftest_has_passed_on_this_gpu(card):
    assert chosen("cuda") == "reference"
    path = _proven.remember("attention", "cuda", passed=True)
    assert path.is_relative_to(Path(_proven.cache_file()).parent) and chosen("cuda") == "cuda"
    assert not _proven.proven("attention", "triton") and not _proven.proven("unmask", "cuda")


@pytest.mark.parametrize("change", [{"name": "H200, driver 2"}, {"kernel": "k2"}])
def test_another_driver_or_kernel_source_asks_for_a_new_selftest(card, change):
    _proven.remember("attention", "cuda", passed=True)
    card.update(change)
    _proven.proven.cache_clear()
    assert chosen("cuda") == "reference"


def test_selftests_side_by_side_lose_no_outcome(card):
    from concurrent.futures import ThreadPoolExecutor

    names = [(op, backend) for op in OPS for backend in ("cuda", "triton")]
    with ThreadPoolExecutor(len(names)) as pool:
        list(pool.map(lambda name: _proven.remember(*name, passed=True), names))
    assert all(_proven.proven(*name) for name in names)


def test_a_failed_selftest_takes_an_earlier_pass_back(card):
    _proven.remember("attention", "cuda", passed=True)
    _proven.remember("attention", "cuda", passed=False)
    assert chosen("cuda") == "reference"


def test_a_committed_result_lets_a_kernel_in_on_gpus_of_its_capability_until_a_selftest_fails(
    card, monkeypatch, tmp_path
):
    installed = tmp_path / "illada_kernels"
    installed.mkdir()
    (installed / "_committed.json").write_text('{"9.0": ["attention/cuda"]}')
    monkeypatch.setattr(_proven, "__file__", str(installed / "_proven.py"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert chosen("cuda") == "cuda" and not _proven.proven("unmask", "cuda")
    _proven.remember("attention", "cuda", passed=False)
    assert chosen("cuda") == "reference"
    card["kernel"] = "k2"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    _proven.proven.cache_clear()
    assert chosen("cuda") == "reference"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    _proven.proven.cache_clear()
    assert chosen("cuda") == "cuda"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"H200, driver 1": 3}'])
def test_a_damaged_memory_is_no_memory(card, content):
    path = _proven.cache_file()
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert chosen("cuda") == "reference"
    _proven.remember("attention", "cuda", passed=True)
    assert chosen("cuda") == "cuda"


def test_the_fingerprint_of_a_kernel_follows_torch_and_the_build_record(installed, monkeypatch):
    monkeypatch.setattr(_proven, "__file__", str(installed / "illada_kernels" / "_proven.py"))
    record = installed / "illada_kernels" / "_build_info.json"
    seen = set()
    for sources in ("1", "2"):
        record.write_text(json.dumps({"sources": sources, "cuda_archs": "90a"}))
        seen.add(_proven.kernel.__wrapped__("masked_loss_from_logits", "cuda"))
    monkeypatch.setattr(torch, "__version__", "9.9")
    seen.add(_proven.kernel.__wrapped__("masked_loss_from_logits", "cuda"))
    assert len(seen) == 3


def test_where_the_system_does_not_tell_the_driver_it_is_asked_itself(monkeypatch, tmp_path):
    def read_text(self):
        raise FileNotFoundError(self)

    def version(at):
        at._obj.value = 13000
        return 0

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(
        _proven.ctypes, "CDLL", lambda name: type(name, (), {"cuDriverGetVersion": staticmethod(version)})
    )
    assert _proven.driver() == "CUDA 13000"
    monkeypatch.setattr(_proven.ctypes, "CDLL", lambda name: type(name, (), {"cuDriverGetVersion": lambda at: 999}))
    with pytest.raises(RuntimeError, match="cuDriverGetVersion failed: error 999"):
        _proven.driver()
