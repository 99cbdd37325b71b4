"""The wheel that `make wheel` publishes: its tag, its description, and that it computes where nothing else is."""

from __future__ import annotations

import re
import shutil
import zipfile

import pytest

pytest.importorskip("auditwheel", reason="pip install 'illada-kernels[release]'")
pytest.importorskip("twine", reason="pip install 'illada-kernels[release]'")

from illada_kernels.ops import OPS
from release import wheel


@pytest.fixture(scope="module")
def repaired(distributions, tmp_path_factory):
    return wheel.repair(distributions["wheel"], tmp_path_factory.mktemp("dist"))


def contents(archive):
    """Names of all files but the metadata's."""
    return {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}


def test_it_has_a_manylinux_tag_and_is_otherwise_the_wheel_that_was_built(repaired, distributions):
    assert re.search(r"-cp310-abi3-manylinux_2_\d\d_x86_64\.whl$", repaired.name)
    with zipfile.ZipFile(repaired) as ours, zipfile.ZipFile(distributions["wheel"]) as built:
        names = contents(built)
        assert contents(ours) == names
        assert all(ours.read(name) == built.read(name) for name in names if "/_C." not in name)


def test_its_checks_pass_and_notice(repaired, distributions, tmp_path):
    info = wheel.check(repaired, cuda=False)
    assert info["extension"] and not info["cuda"]
    with pytest.raises(SystemExit, match="expected an extension with CUDA"):
        wheel.check(repaired, cuda=True)
    with pytest.raises(SystemExit, match="its tag is not cp310-abi3-manylinux"):
        wheel.check(distributions["wheel"], cuda=False)
    more = tmp_path / repaired.name
    shutil.copy(repaired, more)
    with zipfile.ZipFile(more, "a") as archive:
        binary = next(name for name in archive.namelist() if "/_C." in name)
        other = archive.read(binary).replace(b"libgomp.so.1\0", b"libfoo.so.12\0")
        archive.writestr("illada_kernels/libfoo.so", other.replace(b"PyLong_FromLong\0", b"PyLong_FromLonk\0"))
    said = r"interface has no PyLong_FromLonk; expected one binary.*libfoo\.so.*it needs libfoo\.so\.12"
    with pytest.raises(SystemExit, match=said):
        wheel.check(more, cuda=False)


def test_it_passes_its_selftest_in_a_new_environment(repaired):
    said = wheel.try_it(repaired)
    assert set(re.findall(r"^(\w+) +cpu +cpu +passed", said, flags=re.MULTILINE)) == set(OPS)
