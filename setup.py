"""Packaging. `kernels/` installs as `kpu_fast.kernels`; the core needs torch, triton (Linux), numpy, safetensors."""

from pathlib import Path

from setuptools import find_packages, setup

# The tests were run with all lower bounds at once, but for DeepSpeed's: 0.19.7 takes a step of NaN that 0.19.8 skips.
TRAIN = [
    "deepspeed>=0.19.8",
    "transformers>=5.19",
    "sentencepiece",  # SigLIP's tokenizer, by way of transformers
    "protobuf",
    "pydantic>=2.7",
    "tqdm",
    "tensorboard",
    "pillow",
    "scikit-learn",
    "scipy",
    "torchmetrics>=1.4",
    "pycocotools",
    "matplotlib",
]

EXPORT = ["onnx>=1.16", "onnxscript", "onnxruntime"]

setup(
    name="kpu_fast",
    version="0.1.0",
    description="Train one vision student from several frozen teachers, fast: KPU with fused alignment losses.",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Programming Language :: Python :: 3",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.10",
    packages=["kpu_fast.kernels", *find_packages(include=["kpu_fast", "kpu_fast.*"])],
    package_dir={"kpu_fast": "kpu_fast", "kpu_fast.kernels": "kernels"},
    install_requires=["torch>=2.11", "numpy", "safetensors>=0.5", "triton>=3.6; sys_platform == 'linux'"],
    extras_require={
        "train": [*TRAIN, "nvidia-dali-cuda130>=2.2; sys_platform == 'linux'"],
        "train-cu12": [*TRAIN, "nvidia-dali-cuda120>=2.2; sys_platform == 'linux'"],  # beside a torch of CUDA 12
        # Pre-release, Hopper and Blackwell only; later ones return more than torch 2.13 takes.
        # FlashAttention 2 has no wheel and is built by hand (see README).
        "flash": ["flash-attn-4[cu13]>=4.0.0b17,<4.0.0b19; sys_platform == 'linux'"],
        "export": EXPORT,  # ONNX; a .pt2 needs nothing beyond torch
        "dev": [
            *EXPORT,
            "pytest",
            "pytest-benchmark",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "scikit-image",
        ],
    },
)
