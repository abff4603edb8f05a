"""OmegaConf resolvers of the configs: ``benchmark``, ``precision``, ``either``, ``accumulation`` and ``started``."""

import os
from datetime import datetime

from omegaconf import OmegaConf

from primeflow_perturbench.perturbench.backend import locate


def best_precision() -> str:
    """Lightning's ``bf16-mixed`` if the device multiplies bfloat16 natively, else ``32-true``."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"


def either(*choices: str | None) -> str | None:
    """The first choice that is not null."""
    return next((choice for choice in choices if choice not in (None, "None", "null")), None)


def accumulation(effective_batch: int, batch_size: int, devices: int | str | list[int], num_nodes: int = 1) -> int:
    """Number of batches to accumulate for an effective batch size, at least 1.

    ``devices`` is Lightning's: a number, a list of devices, or ``"auto"`` or ``-1`` for all GPUs (one device without a
    GPU).
    """
    if devices in ("auto", -1, "-1"):
        import torch

        devices = max(1, torch.cuda.device_count())
    count = len(devices) if isinstance(devices, list | tuple) else int(devices)
    return max(1, round(effective_batch / (batch_size * count * num_nodes)))


def started() -> str:
    """Folder name of a run: its start time, or the job and its step under Slurm; the same in all its processes.

    A requeued Slurm job thus continues in its folder, where Lightning looks for its checkpoint.
    """
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_ID" in os.environ:
        return "slurm_{SLURM_JOB_ID}_{SLURM_STEP_ID}".format_map(os.environ)
    now = f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return now
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return store.compare_set("primeflow/started", "", now).decode()


def register() -> None:
    """Register the resolvers; a second call does nothing."""
    for name, function in {
        "benchmark": locate,
        "precision": best_precision,
        "either": either,
        "accumulation": accumulation,
    }.items():
        OmegaConf.register_new_resolver(name, function, replace=True)
    OmegaConf.register_new_resolver("started", started, replace=True, use_cache=True)
