"""Compiles `illada_kernels._C` with illada_kernels/_build.py, without torch; the rest is in pyproject.toml."""

import sys
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

have = setuptools.__version__
if int(have.split(".")[0]) < 77:  # as pyproject.toml asks; without build isolation pip does not look
    raise SystemExit(f"setuptools 77 or newer is needed, this is {have}: pip install 'setuptools>=77'")

ROOT = Path(__file__).parent.resolve()
sys.path.insert(0, str(ROOT))  # the package's own __init__ imports nothing
from illada_kernels import _build  # noqa: E402


class BuildExt(build_ext):
    """Editable installs build in place, in the folder that `make build` uses too, so nothing is compiled twice."""

    def run(self):
        package = ROOT if self.inplace else Path(self.build_lib)
        work = ROOT / "build" if self.inplace else Path(self.build_temp)
        _build.build(ROOT, package / "illada_kernels", work)

    def get_outputs(self):  # without a compiler there is no _C, and that is no error
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self):
        return {built: source for built, source in super().get_output_mapping().items() if Path(source).exists()}


setup(
    ext_modules=[Extension("illada_kernels._C", sources=[], py_limited_api=_build.STABLE)],
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if _build.STABLE else {},
)
