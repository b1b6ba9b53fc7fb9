"""An sdist has the two links of a checkout as links: setuptools would copy the files behind them a second time."""

import os
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

LINKS = [path for path in Path("triton_lstm").iterdir() if path.is_symlink()]


class Sdist(sdist):
    def make_release_tree(self, base_dir, files):
        super().make_release_tree(base_dir, [f for f in files if not {*Path(f).parents, Path(f)}.intersection(LINKS)])
        for link in LINKS:
            Path(base_dir, link).symlink_to(os.readlink(link))


setup(cmdclass={"sdist": Sdist})
