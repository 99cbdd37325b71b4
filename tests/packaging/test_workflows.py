"""The workflows of GitHub: what they start exists here, their shell parses, and their jobs fit together."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

yaml = pytest.importorskip("yaml", reason="pip install 'illada-kernels[docs]'")

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
WORKFLOWS = {file.stem: yaml.safe_load(file.read_text()) for file in FILES}
JOBS = [(name, job, WORKFLOWS[name]["jobs"][job]) for name in WORKFLOWS for job in WORKFLOWS[name]["jobs"]]
every_job = pytest.mark.parametrize("name, job, what", JOBS, ids=[f"{name}-{job}" for name, job, _ in JOBS])


def plain(text):
    return re.sub(r"\$\{\{.*?\}\}", "3.11", text)


@every_job
def test_what_a_step_runs_is_here_and_is_shell(name, job, what):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for step in what["steps"]:
        assert ("run" in step) != ("uses" in step), step
        if "run" not in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
            continue
        script = plain(step["run"])
        assert subprocess.run(["bash", "-n", "-c", script]).returncode == 0
        for made in re.findall(r"^make ([\w-]+)", script, flags=re.MULTILINE):
            assert made in targets
        for file in re.findall(r"^bash (\S+)", script, flags=re.MULTILINE):
            assert (ROOT / file).is_file()


@every_job
def test_a_job_has_a_limit_and_needs_jobs_of_its_workflow(name, job, what):
    assert what.get("timeout-minutes", 0) > 0
    needs = what.get("needs", [])
    assert set([needs] if isinstance(needs, str) else needs) <= set(WORKFLOWS[name]["jobs"])


@every_job
def test_matrix_expressions_name_the_matrix(name, job, what):
    known = what.get("strategy", {}).get("matrix", {})
    assert set(re.findall(r"matrix\.(\w+)", yaml.safe_dump(what))) == set(known)


def test_a_release_has_a_wheel_with_and_without_cuda_for_every_python():
    assert WORKFLOWS["release"]["jobs"]["wheel"]["strategy"]["matrix"] == {"cuda": [0, 1]}


def test_what_a_release_downloads_was_uploaded():
    jobs = WORKFLOWS["release"]["jobs"]
    steps = [step for job in jobs.values() for step in job["steps"] if "uses" in step]
    made = [plain(step["with"]["name"]) for step in steps if "upload-artifact" in step["uses"]]
    wanted = [step["with"]["pattern"] for step in steps if "download-artifact" in step["uses"]]
    assert made and wanted and all(fnmatch.filter(made, pattern) for pattern in wanted)
    assert jobs["attach"]["permissions"] == {"contents": "write"}
