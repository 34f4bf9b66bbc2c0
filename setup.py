"""Build script: pyproject.toml says everything about the package; compiled ops (csrc/) will be declared here."""

from setuptools import setup

setup()
