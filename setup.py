"""Packages of the wheel: the code, and configs, small weights and sample data as ``cogview3/_data``.

The rest of the project's description is in pyproject.toml, which cannot join found packages with named ones.
"""

from setuptools import find_packages, setup

DATA = {f"cogview3._data.{name}": name for name in ("configs", "checkpoints")}
DATA |= {f"cogview3._data.data.{name}": f"data/{name}" for name in ("emoji_sample", "emoji_sample_3d")}
FILES = ["*.yaml", "*.txt", "**/*.json", "**/*.safetensors", "**/*.model", "**/*.png", "**/*.jsonl"]

setup(
    packages=[*find_packages(include=["cogview3*", "sat*"]), *DATA],
    package_dir=DATA,
    package_data={
        "sat.apps.emoji": ["*.txt"],
        "sat.apps.preference": ["*.html"],
        "sat.control": ["hub/*.py"],
        **dict.fromkeys(DATA, FILES),
    },
)
