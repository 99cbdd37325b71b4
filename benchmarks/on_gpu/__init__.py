"""The command for a machine with an NVIDIA GPU: `python -m benchmarks.on_gpu`."""
