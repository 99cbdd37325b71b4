"""benchmarks/quality/train_step.py: all contenders of a case, and the time of the one that works more."""

from __future__ import annotations

import re
import time

import pytest
import torch

from benchmarks.quality import train_step


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_case_has_a_line_for_each_contender(capsys, threads):
    assert train_step.main(["--case", "batch 4 x 128", "--steps", "1"]) == 0
    rows = re.findall(
        r"^\| block 4, batch 4 x 128 \| (.+?) \| (\d+) \| (\d+) \| ([\d.]+) \|$", capsys.readouterr().out, re.M
    )
    assert [name for name, *_ in rows] == ["ours", "torch's norms", "SDPA and F.cross_entropy"]
    assert all(int(ms) > 0 and int(system) <= int(ms) for _, ms, system, _ in rows) and rows[0][3] == "1.00"


def test_processor_time_is_that_of_work_not_of_waiting():
    def work() -> None:
        end = time.process_time() + 0.2
        while time.process_time() < end:
            pass

    assert 190 <= round(train_step.spent(work)[0], 6) <= 300
    assert train_step.spent(lambda: time.sleep(0.2))[0] <= 50
