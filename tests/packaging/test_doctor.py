"""The doctor on healthy and on broken installations."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from illada_kernels import _build, _dispatch, doctor
from illada_kernels.ops import OPS

BACKENDS = set(_dispatch.DEVICES)


def healed(done) -> dict:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def text_of(found: dict, monkeypatch, capsys) -> str:
    """What the doctor prints without --json."""
    monkeypatch.setattr(doctor, "report", lambda: found)
    assert doctor.main(["doctor"]) == 0
    return capsys.readouterr().out


def test_report_names_every_op_and_backend_with_a_reason_or_a_place(python, monkeypatch, capsys):
    found = healed(python("-m", "illada_kernels", "doctor", "--json"))
    assert set(found["ops"]) == set(OPS)
    for op, rows in found["ops"].items():
        assert {row["backend"] for row in rows} == BACKENDS, op
        assert all(row["reason"] is None or row["reason"].strip() for row in rows)
        reference = next(row for row in rows if row["backend"] == "reference")
        assert reference["reason"] is None and reference["place"]["cpu"] >= 1
        places = [row["place"]["cpu"] for row in rows if row.get("place", {}).get("cpu")]
        assert places == list(range(1, len(places) + 1))  # the rows stand in the default order
    assert found["torch"]["version"] == torch.__version__
    lines = [line.split()[:2] for line in text_of(found, monkeypatch, capsys).splitlines() if line.strip()]
    for op in OPS:  # the text has a line for each, too
        assert {backend for first, backend in (line for line in lines if len(line) == 2) if first == op} == BACKENDS


def test_a_reason_that_many_share_is_said_once_below_the_table():
    def row(backend, reason=None, opt_in=None):
        return {"backend": backend, "reason": reason, "opt_in": opt_in, "place": {"cpu": 1} if not opt_in else {}}

    unrun, gone = "not yet run on a GPU", "the extension is missing"
    rows = [row("cuda", gone, unrun), row("triton", None, unrun), row("cpu", gone), row("reference")]
    lines = doctor.table({"attention": rows, "unmask": rows})
    assert [line[53:] for line in lines[1:5]] == [
        "not available [1] [2]",
        "available as backend='triton' [2]",
        "not available [1]",
        "available",
    ]
    assert [line[53:] for line in lines[5:9]] == [line[53:] for line in lines[1:5]]
    assert lines[9:] == [f"[1] {gone}", f"[2] {unrun}"]


def test_what_a_build_passed_over_is_reported():
    info = {
        "extension": True,
        "compiler": "g++",
        "cuda": False,
        "seconds": 1,
        "notes": ["CXX names 'x', which is not there"],
    }
    assert any("CXX names 'x'" in line for line in doctor.extension_lines(info, {"cpu_isa": "avx2"}))


def test_a_reader_that_leaves_early_ends_the_doctor_quietly(root):
    command = [sys.executable, "-m", "illada_kernels", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=root)
    process.stdout.close()  # as `doctor | true` does
    assert (process.stderr.read(), process.wait()) == (b"", 141)


def test_no_gpu_kernel_is_in_a_default_order_before_it_ran_on_a_gpu():
    import importlib

    for op, room in OPS.items():
        module = importlib.import_module(f"illada_kernels.ops.{room}")
        for backend in module.BACKENDS:
            assert backend.name not in ("cuda", "triton") or "GPU" in (backend.opt_in or ""), (op, backend)


# ---- broken installations -------------------------------------------------------------------------------------------

BROKEN = {
    "absent": ("raise ModuleNotFoundError(\"No module named 'torch'\")", "No module named 'torch'"),
    "raises at import": ("raise RuntimeError('built for another planet')", "RuntimeError: built for another planet"),
    "exits at import": ("raise SystemExit(3)", "SystemExit: 3"),
    "aborts at import": ("import os; os.abort()", "died of SIGABRT"),
    "is something else": ("x = 1", "no version"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_report_survives_a_torch_that(how, python, tmp_path, root):
    source, reason = BROKEN[how]
    (tmp_path / "torch.py").write_text(source + "\n")
    done = python("-m", "illada_kernels", "doctor", "--json", path=(tmp_path, root))
    found = healed(done)
    assert reason in found["torch"]["error"]
    for rows in found["ops"].values():
        assert {row["backend"] for row in rows} == BACKENDS and all(row["reason"] for row in rows)
    text = python("-m", "illada_kernels", "doctor", path=(tmp_path, root))
    assert text.returncode == 0 and reason in text.stdout


def states(found: dict, backend: str) -> set[bool]:
    return {row["reason"] is None for rows in found["ops"].values() for row in rows if row["backend"] == backend}


def test_report_survives_a_corrupt_extension_and_the_reference_still_runs(python, installed, monkeypatch, capsys):
    binary = installed / "illada_kernels" / f"_C{_build.SUFFIX}"
    binary.write_bytes(b"\x7fELF" + bytes(200))
    found = healed(python("-m", "illada_kernels", "doctor", "--json", path=(installed,), cwd=installed))
    assert "ImportError" in found["extension"]["error"]
    assert states(found, "cpu") == {False} and states(found, "reference") == {True}
    assert "ImportError" in text_of(found, monkeypatch, capsys)


@pytest.mark.parametrize("source", ["raise ValueError('bad table')", "import os; os.abort()"])
def test_report_survives_an_extension_that_fails_in_another_way(source, python, installed):
    (installed / "illada_kernels" / "_C.py").write_text(source + "\n")
    found = healed(python("-m", "illada_kernels", "doctor", "--json", path=(installed,), cwd=installed))
    assert "ValueError: bad table" in found["extension"]["error"] or "SIGABRT" in found["extension"]["error"]
    assert states(found, "cpu") == {False}


def test_report_survives_an_installation_that_was_never_built_and_writes_nothing_into_it(python, installed, tmp_path):
    (installed / "illada_kernels" / "_build_info.json").unlink(missing_ok=True)
    before, cache = sorted(installed.rglob("*")), tmp_path / "cache"
    run = {"path": (installed,), "cwd": installed, "XDG_CACHE_HOME": str(cache)}
    found = healed(python("-m", "illada_kernels", "doctor", "--json", **run))
    assert found["build"]["extension"] is False and "make build" in found["build"]["reason"]
    assert "No module named 'illada_kernels._C'" in found["extension"]["error"]
    assert sorted(installed.rglob("*")) == before and not cache.exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "{}", '{"extension": true}'])
def test_a_damaged_build_record_counts_as_none(content, installed, monkeypatch):
    (installed / "illada_kernels" / "_build_info.json").write_text(content)
    monkeypatch.setattr(doctor, "PACKAGE", installed / "illada_kernels")
    info = doctor.build_info()
    assert info["extension"] is False and "make build" in doctor.extension_lines(info, {"error": "none"})[0]


def test_report_says_when_the_sources_have_changed_since_the_build(installed, monkeypatch):
    package = installed / "illada_kernels"
    (installed / "csrc").mkdir()
    (installed / "csrc" / "a.cpp").write_text("int x;\n")
    record = {"extension": True, "reason": "built", "compiler": "g++", "cuda": False, "seconds": 1}
    monkeypatch.setattr(doctor, "PACKAGE", package)
    for sources, stale in (("0", True), (doctor._build.fingerprint(installed / "csrc"), False)):
        (package / "_build_info.json").write_text(json.dumps({**record, "sources": sources}))
        assert doctor.build_info()["stale"] is stale
        lines = doctor.extension_lines(doctor.build_info(), {"cpu_isa": "avx2"})
        assert any("make build" in line for line in lines) is stale
