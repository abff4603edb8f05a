"""Memory, loading cost and resumability of pretraining on an atlas that is streamed from disk.

    python benchmarks/atlas.py --folder atlas

Simulates 6 files with 300,000 cells x 4,000 genes in total (kept in ``--folder`` and reused), then trains
`experiment=atlas/small` in separate processes: once uninterrupted, once killed by SIGKILL half-way and resumed, and
once on the same few batches over and over, which is a step without loading. The loader is timed alone as well.
Writes ``benchmarks/results/atlas.json``:

- ``peak_gib``: peak memory of the uninterrupted run; the target is below 4.
- ``loading_share``: seconds of the loader alone per batch as a share of a step, the cost if loading did not overlap
  with computing; the target is below 0.2. ``slowdown`` is the cost that remains, 1 - repeated / streamed.
- ``resumed_equal``: whether the killed and the uninterrupted run end with the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import lightning as L

from primeflow_perturbench.data.atlas.module import AtlasDataModule
from primeflow_perturbench.files import write_json
from primeflow_perturbench.training.provenance import commit, hardware, peak_memory, versions

RESULT = Path(__file__).parent / "results" / "atlas.json"
BARS = {"peak_gib": 4.0, "loading_share": 0.2}
FULL = {"cells": 300_000, "genes": 4000, "steps": 60, "batch": 128, "seconds": 20.0, "width": 32}
QUICK = {"cells": 1200, "genes": 60, "steps": 12, "batch": 32, "seconds": 0.2, "width": 8}
FILES = 6
# The first steps warm up and are not timed.
WARM_UP = 4
REPEATED = 8


class Repeated:
    """The first few batches of a loader over and over, from memory, as often as the loader has batches."""

    def __init__(self, loader: Iterable):
        self.length, self.batches = len(loader), list(islice(loader, REPEATED))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator:
        return islice(cycle(self.batches), self.length)


class RepeatedAtlas(AtlasDataModule):
    """An atlas of which only the first few batches are trained on."""

    def train_dataloader(self) -> Repeated:
        """The same batches over and over."""
        return Repeated(super().train_dataloader())


class Clock(L.Callback):
    """Times the steps, and kills the process at a step.

    Parameters
    ----------
    kill
        Step at which the process is killed; ``None`` for never.
    """

    def __init__(self, kill: int | None = None):
        self.kill, self.ends = kill, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """Kill the process."""
        if trainer.global_step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Record the time."""
        self.ends.append(time.perf_counter())

    def seconds(self, every: int) -> float:
        """Mean of the steps that neither warm up nor lie next to a checkpoint, which is written every so many steps."""
        counted = [
            self.ends[step] - self.ends[step - 1]
            for step in range(WARM_UP, len(self.ends))
            if step % every not in (every - 1, 0)
        ]
        return sum(counted) / len(counted)


def settings_of(manifest: Path, folder: Path, sizes: dict[str, Any]) -> list[str]:
    """Overrides of every run."""
    return [
        "experiment=atlas/small",
        f"data.data.filename={manifest}",
        f"data.data.cache_dir={manifest.parent / 'unpacked'}",
        f"data.loader.batch_size={sizes['batch']}",
        f"model.network.width={sizes['width']}",
        f"paths.output_dir={folder}",
        "run_name=atlas",
        f"trainer.max_steps={sizes['steps']}",
        f"trainer.val_check_interval={sizes['steps']}",
        "trainer.limit_val_batches=1",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        f"callbacks.model_checkpoint.every_n_train_steps={sizes['steps'] // 3}",
        "callbacks.model_checkpoint.save_top_k=-1",
        "~callbacks.progress_bar",
        "+trainer.enable_progress_bar=false",
    ]


def train_once(options: argparse.Namespace, sizes: dict[str, Any]) -> None:
    """One run in this process; writes its figures to ``run.json`` in its folder."""
    import hydra

    from primeflow_perturbench.perturbench.backend import load_embedded
    from primeflow_perturbench.training import resolvers

    resolvers.register()
    folder, clock = Path(options.run), Clock(sizes["steps"] // 2 if options.kill else None)
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        cfg = hydra.compose("train", settings_of(Path(options.manifest), folder, sizes))
    cfg.ckpt_path = options.resume
    if options.repeated:
        cfg.data._target_ = f"{__name__}.{RepeatedAtlas.__name__}"
    done = load_embedded("modelcore.train.train")(cfg, callbacks=[clock])
    figures = {"peak_gib": peak_memory()["host_gib"]}
    if options.resume is None:
        figures["step_seconds"] = clock.seconds(sizes["steps"] // 3)
    if not options.repeated and options.resume is None:
        figures["loader_cells_per_second"] = loader_speed(done["datamodule"], sizes["seconds"])
    write_json(folder / "run.json", figures)


def loader_speed(module: AtlasDataModule, seconds: float) -> float:
    """Cells per second of the loader alone, after its first batch."""
    cells, batches = 0, iter(module.train_dataloader())
    next(batches)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = iter(module.train_dataloader())
            continue
        cells += len(batch.gene_expression)
    return cells / (time.perf_counter() - start)


def in_child(manifest: Path, folder: Path, quick: bool, *flags: str) -> dict[str, Any]:
    """Figures of a run in its own process; none of a run that is killed."""
    command = [sys.executable, __file__, "--run", str(folder), "--manifest", str(manifest), *flags]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=False)
    if "--kill" in flags and done.returncode == -signal.SIGKILL:
        return {}
    if done.returncode != 0 or "--kill" in flags:
        raise RuntimeError(f"{' '.join(flags) or 'the uninterrupted run'} ended with {done.returncode}:\n{done.stderr}")
    return json.loads((folder / "run.json").read_text())


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits of weights and averaged weights."""
    import torch

    first, second = (torch.load(path, map_location="cpu", weights_only=True) for path in (a, b))
    return all(
        torch.equal(value, second[part][name])
        for part in ("state_dict", "current_model_state")
        for name, value in first[part].items()
    )


def measure(folder: Path, sizes: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Simulate the atlas unless it exists, train on it, and return all figures."""
    from primeflow_perturbench.simulation.atlas import simulate_atlas

    manifest = folder / "manifest.yaml"
    if not manifest.is_file():
        simulate_atlas(folder, n_files=FILES, cells=sizes["cells"], n_genes=sizes["genes"])
    last = f"checkpoints/step{sizes['steps']}.ckpt"
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        uninterrupted, killed, repeated = (Path(runs) / name for name in ("uninterrupted", "killed", "repeated"))
        streamed = in_child(manifest, uninterrupted, quick)
        in_child(manifest, killed, quick, "--kill")
        in_child(manifest, killed, quick, "--resume", str(killed / "checkpoints/last.ckpt"))
        without_loading = in_child(manifest, repeated, quick, "--repeated")
        resumed_equal = same_weights(uninterrupted / last, killed / last)
    step, cells_per_second = streamed["step_seconds"], streamed["loader_cells_per_second"]
    return {
        "peak_gib": streamed["peak_gib"],
        "step_seconds": step,
        "repeated_step_seconds": without_loading["step_seconds"],
        "loader_cells_per_second": cells_per_second,
        "loading_share": sizes["batch"] / cells_per_second / step,
        "slowdown": 1 - without_loading["step_seconds"] / step,
        "resumed_equal": resumed_equal,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of the simulated atlas (default: a temporary one)")
    parser.add_argument("--quick", action="store_true", help="small sizes, as a smoke test")
    parser.add_argument("--commit", default=commit(), help="commit of the source, if the machine has no git")
    parser.add_argument("--output", type=Path, default=RESULT)
    for name in ("--run", "--manifest", "--resume"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--kill", "--repeated"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = QUICK if options.quick else FULL
    if options.run is not None:
        train_once(options, sizes)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(folder.resolve(), sizes, options.quick)
    figures = {name: value if isinstance(value, bool) else float(f"{value:.3g}") for name, value in figures.items()}
    print(json.dumps(figures), flush=True)
    record = {
        "files": FILES,
        **sizes,
        **figures,
        "bars": BARS,
        "met": {name: figures[name] < bar for name, bar in BARS.items()} | {"resumed_equal": figures["resumed_equal"]},
        "hardware": hardware(),
        "versions": versions(),
        "commit": options.commit,
    }
    write_json(options.output, record)


if __name__ == "__main__":
    main()
