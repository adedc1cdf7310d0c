"""What setup.cfg cannot say: packages are found, and conf/ travels inside them as rlzoo/conf."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["rlzoo", "rlzoo.*"]), "rlzoo.conf"],
    package_dir={"rlzoo.conf": "conf"},
)
