"""dqbench: reproduce, compare and extend post-training quantization (PTQ) of diffusion models."""
