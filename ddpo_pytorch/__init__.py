"""RL4Med-DDPO: reinforcement learning that makes a diffusion model draw what its caption says."""

__version__ = "0.1.0"
