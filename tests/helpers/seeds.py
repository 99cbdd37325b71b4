"""Spares torch.manual_seed what it does for devices that this machine lacks."""


def spare_seeds() -> None:
    """Torch queues each seed of a missing device with its caller's formatted stack: 0.7 ms in a test, before every one
    of which there is a seed."""
    import torch

    for module in (torch.cuda, torch.xpu, torch.mtia):
        if not module.is_available():
            module.manual_seed_all = lambda seed: None  # type: ignore[attr-defined]
