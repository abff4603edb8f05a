"""Resolvers of the configuration: ``benchmark``, ``precision``, ``either`` and ``accumulation``."""

from omegaconf import OmegaConf

from primeflow_perturbench.benchmark import locate


def best_precision() -> str:
    """Lightning's ``bf16-mixed`` where the device multiplies bfloat16 natively, else ``32-true``."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"


def either(*choices: str | None) -> str | None:
    """The first of some choices that was made."""
    return next((choice for choice in choices if choice not in (None, "None", "null")), None)


def accumulation(effective_batch: int, batch_size: int, devices: int | str | list[int], num_nodes: int = 1) -> int:
    """Batches to accumulate for an effective batch on Lightning's ``devices``, at least 1.

    ``devices`` may be a number, a list of devices, or ``"auto"`` or ``-1`` for all GPUs (one device without any).
    """
    if devices in ("auto", -1, "-1"):
        import torch

        devices = max(1, torch.cuda.device_count())
    count = len(devices) if isinstance(devices, list | tuple) else int(devices)
    return max(1, round(effective_batch / (batch_size * count * num_nodes)))


def register() -> None:
    """Make the resolvers known; a second call does nothing."""
    for name, function in {
        "benchmark": locate,
        "precision": best_precision,
        "either": either,
        "accumulation": accumulation,
    }.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
