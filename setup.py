"""Packaging: the library, its seqio tasks, its launchers, and the gin files as data of the library.

`gin/` must never become a package of its own: it would hide gin-config's module of that name. A wheel carries it as
`t5x_ssm/gin/`, where `--gin_file` looks for files when there is no clone around.
"""

import pathlib
import re

import setuptools

ROOT = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "t5x_ssm/__init__.py").read_text()).group(1)
DOCS = ["mkdocs-material>=9.5,<10", "mkdocstrings[python]>=0.27,<2"]
# What single formats of corpora and vocabularies need; TFDS imports importlib_resources and does not say so.
DATA = ["importlib_resources>=6", "pyarrow>=18", "tokenizers>=0.20,<1", "zstandard>=0.22,<1"]
GCS = "gcsfs>=2024.6"  # run folders and token caches at gs://
ROUGE = "rouge-score>=0.1.2,<1"  # a metric of summaries

setuptools.setup(
    name="t5x_ssm",
    version=VERSION,
    description="Pretraining state-space and hybrid language models on accelerator pods",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=[
        *setuptools.find_packages(include=["t5x_ssm", "t5x_ssm.*", "tasks", "tasks.*", "launch", "launch.*"]),
        "t5x_ssm.gin",
    ],
    package_dir={"t5x_ssm.gin": "gin"},
    package_data={"t5x_ssm.gin": ["**/*.gin"], "launch": ["*.sh"]},
    install_requires=[
        "absl-py>=2.1,<3",
        "flax>=0.12.8,<0.13",
        "fsspec>=2024.6",
        "gin-config>=0.5,<0.6",
        "grain>=0.2.18,<0.3",
        "jax>=0.10.2,<0.12",
        "numpy>=2.0,<3",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12.8,<0.13",
        "scipy>=1.14,<2",
        "sentencepiece>=0.2.3,<0.3",
        "seqio>=0.0.20,<0.1",
        "tensorboardX>=2.6,<3",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        "data": DATA,
        "aot": ["libtpu>=0.0.42,<0.1"],  # the TPU compiler, for launch.compile on any machine
        "eval": ["lm_eval>=0.4.9,<0.5", ROUGE],
        "export": ["safetensors>=0.4.5,<1"],
        "docs": DOCS,
        "gcs": [GCS],
        "plots": ["matplotlib>=3.9,<4"],
        # What T5X imports and the index has; T5X itself is not there, see docs/t5x.md.
        "t5x": [
            "cached-property>=2,<3",
            "chex>=0.1.89",
            "fiddle>=0.3,<0.4",
            "jaxtyping>=0.2.34",
            "tensorboard>=2.18",
            "tensorstore>=0.1.70",
        ],
        "test": [
            *DATA,
            *DOCS,
            GCS,
            "hypothesis>=6.100,<7",
            "matplotlib>=3.9,<4",
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            ROUGE,
            "ruff>=0.8",
            "safetensors>=0.4.5,<1",
        ],
        "tpu": ["jax[tpu]>=0.10.2,<0.12", GCS],  # hosts of a pod share no disk
    },
)
