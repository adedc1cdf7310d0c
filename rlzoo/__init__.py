"""rlzoo: reinforcement learning of LLM reasoning on PyTorch Lightning."""

__version__ = "0.1.0"
