"""What pyproject.toml cannot say: the recipes of configs/ are installed as crate_jax/configs."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["crate_jax*"]), "crate_jax.configs"],
    package_dir={"crate_jax.configs": "configs"},
)
