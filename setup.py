"""Package and extras of megatron_ext. The base install needs no compiler and no CUDA."""

from pathlib import Path

from setuptools import Command, find_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path(__file__).with_name("megatron_ext").joinpath("__init__.py").read_text("utf-8").splitlines()
    if line.startswith("__version__")
)


class BuildKernels(Command):
    """python setup.py build_kernels: build all kernels of csrc/ now, rather than each when it is first used."""

    description = "build the C++ kernels, and the CUDA kernels where nvcc is installed, into the cache that megatron_ext reads"
    user_options = [("architectures=", None, "of GPUs, as 80,90a; default: those present, or else 80,90a,100a")]

    def initialize_options(self) -> None:
        """For the GPUs that are present."""
        self.architectures = ""

    def finalize_options(self) -> None:
        """Split the list."""
        self.architectures = [name for name in self.architectures.split(",") if name]

    def run(self) -> None:
        """Build what is not built and say where everything lies."""
        from megatron_ext.kernels.build import build_all

        for library in build_all(architectures=self.architectures):
            print(library)


setup(
    name="megatron_ext",
    version=VERSION,
    description="Continue the pretraining of language models on long, uneven documents",
    long_description=Path(__file__).with_name("README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["megatron_ext", "megatron_ext.*"]),
    # megatron_ext/csrc is a link to csrc/; a wheel holds the files.
    package_data={"megatron_ext": ["csrc/*/*.h", "csrc/*/*.cpp", "csrc/*/*.cu", "csrc/*/*.cuh"]},
    cmdclass={"build_kernels": BuildKernels},
    install_requires=[
        "torch>=2.11,<2.14",
        "deepspeed>=0.19,<0.20",
        "transformers>=5.0,<6",
        "datasets>=4.0,<6",
        "tokenizers>=0.22,<1",
        "sentencepiece>=0.2,<0.3",
        "numpy>=1.26,<3",
        "numba>=0.61,<1",
        "highspy>=1.8,<2",
        "pyarrow>=17",
        "pydantic>=2.9,<3",
        "pyyaml>=6,<7",
        "rich>=13,<16",
        "safetensors>=0.5,<1",
        "tensorboard>=2.17,<3",
        "zstandard>=0.22,<1",
        "matplotlib>=3.9,<4",
        "packaging>=23",
        "setuptools",
    ],
    extras_require={
        "dev": [
            "pytest>=8,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6,<7",
            "megatron-core>=0.13,<0.17",
            "adamp>=0.3,<0.4",
            "ml_dtypes>=0.5,<1",
            "scipy>=1.11,<2",
            "triton>=3.3,<4; platform_system == 'Linux'",
            "ruff>=0.9,<1",
            "wandb>=0.18,<1",
        ],
        "cuda": ["flash-attn>=2.7,<3"],
        "eval": ["lm-eval>=0.4.8,<0.5"],
        "wandb": ["wandb>=0.18,<1"],
    },
)
