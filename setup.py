"""Compiles `illada_kernels._C` with illada_kernels/_build.py, without torch; the rest is in pyproject.toml."""

import importlib.util
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


def load_build_module():
    spec = importlib.util.spec_from_file_location("illada_build", ROOT / "illada_kernels" / "_build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildExt(build_ext):
    """Editable installs build in place, in the folder that `make build` uses too, so nothing is compiled twice."""

    def run(self):
        package = ROOT if self.inplace else Path(self.build_lib)
        work = ROOT / "build" if self.inplace else Path(self.build_temp)
        load_build_module().build(ROOT, package / "illada_kernels", work)

    def get_outputs(self):  # without a compiler there is no _C, and that is no error
        return [path for path in super().get_outputs() if Path(path).exists()]

    def get_output_mapping(self):
        return {built: source for built, source in super().get_output_mapping().items() if Path(source).exists()}


setup(ext_modules=[Extension("illada_kernels._C", sources=[])], cmdclass={"build_ext": BuildExt})
