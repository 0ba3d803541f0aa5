"""Masked-diffusion language models: loading, sampling, calibration, likelihood."""
