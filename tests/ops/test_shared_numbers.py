"""The numbers on which C++, CUDA and Python must agree: api.h holds the only copy in C; those in Python equal it."""

import re
from pathlib import Path

import pytest
import torch

from illada_kernels import rules
from illada_kernels._extension import DTYPES
from illada_kernels.ops.unmask import cuda, gpu, nvrtc, problem

HEADER = Path(__file__).resolve().parents[2] / "csrc/include/illada/api.h"


def enum(name: str) -> dict[str, int]:
    """The members of an enum of api.h, without their prefix."""
    (body,) = re.findall(rf"enum {name} {{(.*?)}}", HEADER.read_text(), re.S)
    members = re.findall(r"ILLADA_(\w+) = (\d+)", body)
    assert len(members) == body.count(",") + 1, f"{name}: every member says its number"
    return {member: int(number) for member, number in members}


def defined(name: str) -> int:
    (number,) = re.findall(rf"#define {name} (\d+)", HEADER.read_text())
    return int(number)


@pytest.mark.parametrize(
    "name, count",
    [
        ("illada_unmask_rule", 6),
        ("illada_unmask_revise", 4),
        ("illada_unmask_confidence", 5),
        ("illada_unmask_order", 2),
    ],
)
def test_kinds_have_the_numbers_of_the_header(name: str, count: int) -> None:
    members = enum(name)
    assert len(members) == count
    assert members == {member: getattr(rules, member) for member in members}


def test_confidences_are_named_in_the_order_of_the_header() -> None:
    assert [member.lower() for member in enum("illada_unmask_confidence")] == list(rules.CONFIDENCES)


@pytest.mark.parametrize("name, count", [("illada_unmask_needs", 5), ("illada_unmask_truncate", 3)])
def test_bits_are_those_of_the_header(name: str, count: int) -> None:
    members = enum(name)
    assert len(members) == count
    assert members == {member: getattr(problem, member) for member in members}


def test_dtypes_have_the_numbers_of_the_header() -> None:
    names = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    assert enum("illada_dtype") == {name: DTYPES[dtype] for name, dtype in names.items()}
    assert len(DTYPES) == len(names)


def test_sizes_are_those_of_the_header() -> None:
    assert cuda.FIELDS == defined("ILLADA_UNMASK_FIELDS")
    assert cuda.SORT_IN_SHARED == defined("ILLADA_UNMASK_SORT_IN_SHARED")
    assert gpu.SLICE == nvrtc.SPAN == defined("ILLADA_UNMASK_SPAN")


def test_what_counts_in_a_sum_is_what_the_header_says() -> None:
    (number,) = re.findall(r"#define ILLADA_UNMASK_LEAST_SHIFTED (-[\d.]+)f", HEADER.read_text())
    assert problem.LEAST_SHIFTED == float(number)
