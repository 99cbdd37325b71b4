"""Packaging hook: compiles `illada_kernels._C` with illada_kernels/_build.py (no torch needed), everything else is in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent


def load_build_module():
    spec = importlib.util.spec_from_file_location("illada_build", ROOT / "illada_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildExt(build_ext):
    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        load_build_module().build(ROOT, target.parent, Path(self.build_temp))

    def get_outputs(self):
        return [path for path in super().get_outputs() if Path(path).exists()]


setup(ext_modules=[Extension("illada_kernels._C", sources=[])], cmdclass={"build_ext": BuildExt})
