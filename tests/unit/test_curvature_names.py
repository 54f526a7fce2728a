"""The small library's public names: all there, and none imported before it is used."""

import subprocess
import sys

import pytest

import raysweep.curvature as curvature


@pytest.mark.parametrize("name", curvature.__all__)
def test_every_name_is_there(name):
    assert callable(getattr(curvature, name))
    assert name in dir(curvature)


def test_importing_the_package_imports_no_torch():
    program = "import sys, raysweep.curvature.cost; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        curvature.nothing  # noqa: B018
