from setuptools import find_packages, setup

RATE = ["fastapi>=0.120.1", "pydantic>=2.7", "uvicorn>=0.30"]  # the rating page
TEST = ["mypy>=1.11", "pydicom>=3.0", "pytest>=8.0", "pytest-xdist>=3.6", "ruff>=0.9"]
TEST += ["selenium>=4.20", "setuptools>=77"]

setup(
    name="rl4med-ddpo",
    version="0.1.0",
    description="Reinforcement learning that makes diffusion models draw medical images matching their captions",
    license="MIT",
    python_requires=">=3.11",
    # installed, the commands are python -m ddpo_pytorch.scripts.train and so on
    packages=[
        *find_packages(include=["ddpo_pytorch", "ddpo_pytorch.*"]),
        *("ddpo_pytorch.scripts", "ddpo_pytorch.config", "ddpo_pytorch.config.accelerate"),
    ],
    package_dir={"ddpo_pytorch.scripts": "scripts", "ddpo_pytorch.config": "config"},
    package_data={
        "ddpo_pytorch.config.accelerate": ["*.yaml"],
        "ddpo_pytorch": [
            "py.typed",
            "assets/*.txt",
            "assets/mini/*",
            "assets/mini/sd/*",
            "assets/mini/sd/*/*",
            "report/*.j2",
            "report/*.css",
            "rating/*.html",
            "rating/*.css",
            "rating/*.js",
        ],
    },
    install_requires=[
        "torch>=2.6",
        "torchvision>=0.21",
        "diffusers>=0.42.1",
        "transformers>=5.0",
        "accelerate>=1.10",
        "peft>=0.18",
        "ml_collections>=1.1",
        "absl-py>=2.1",
        "numpy>=2.0",
        "pillow>=10.3",
        "safetensors>=0.5",
        "timm>=1.0.3",
        "scipy>=1.15",
        "torchmetrics>=1.8",
        "torch-fidelity>=0.3",
        "lpips>=0.1.4",
        "pandas[output-formatting]>=2.2.2",
        "tqdm>=4.66.3",
        "jinja2>=3.1.6",
        "matplotlib>=3.9",
        "gdown>=6.3",
        "filelock>=4.0",
        "psutil>=5.9",
        "wandb>=0.19",
    ],
    extras_require={
        "dicom": ["pydicom>=3.0"],
        "rate": RATE,
        "tensorboard": ["tensorboard>=2.16"],
        "test": [*RATE, *TEST],
    },
)
