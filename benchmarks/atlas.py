"""Measure pretraining on an atlas that is streamed from disk: memory, what loading costs, and whether it resumes.

    python benchmarks/atlas.py --folder atlas

Simulates 6 files of 300,000 cells x 4,000 genes in all (kept in ``--folder``, and found again there), then trains
`experiment=atlas/small` in processes of its own: once unbroken, once killed by SIGKILL half-way and resumed, and once
on the same few batches over and over, which is what a step costs without loading. The loader is timed alone as well,
with nothing else to do. Writes ``benchmarks/results/atlas.json``:

- ``peak_gib``: most memory that the unbroken run held at a time; is to be below 4.
- ``loading_share``: seconds that the loader alone takes for a batch, as a share of a step; is to be below 0.2. This is
  the cost if none of it were hidden behind the step; ``slowdown`` is what is left of it, 1 - repeated / streamed.
- ``resumed_equal``: whether the killed and the unbroken run end with the same bits.
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
# Steps at whose ends the time is not taken: the first ones warm up.
WARM_UP = 4
REPEATED = 8


class Repeated:
    """The first few batches of a loader over and over, from memory, as many as the loader has."""

    def __init__(self, loader: Iterable):
        self.length, self.batches = len(loader), list(islice(loader, REPEATED))

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator:
        return islice(cycle(self.batches), self.length)


class RepeatedAtlas(AtlasDataModule):
    """An atlas of which the first few batches alone are trained on."""

    def train_dataloader(self) -> Repeated:
        """The same batches over and over."""
        return Repeated(super().train_dataloader())


class Clock(L.Callback):
    """Seconds of each step, from its end to the next one's; ends the process half-way where asked.

    Parameters
    ----------
    kill
        Step in which the process is killed.
    """

    def __init__(self, kill: int | None = None):
        self.kill, self.ends = kill, []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        """End the process."""
        if trainer.global_step == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        """Note the time."""
        self.ends.append(time.perf_counter())

    def seconds(self, every: int) -> float:
        """Mean of the steps that neither warm up nor stand beside the checkpoint of every so many steps."""
        counted = [
            self.ends[step] - self.ends[step - 1]
            for step in range(WARM_UP, len(self.ends))
            if step % every not in (every - 1, 0)
        ]
        return sum(counted) / len(counted)


def settings_of(manifest: Path, folder: Path, sizes: dict[str, Any]) -> list[str]:
    """Overrides of the configuration of every run."""
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


def train_once(chosen: argparse.Namespace, sizes: dict[str, Any]) -> None:
    """One run in this process; its figures go to ``run.json`` in its folder."""
    import hydra

    from primeflow_perturbench.perturbench.embedded.modelcore.train import train
    from primeflow_perturbench.training import resolvers

    resolvers.register()
    folder, clock = Path(chosen.run), Clock(sizes["steps"] // 2 if chosen.kill else None)
    with hydra.initialize_config_module("primeflow_perturbench.configs", version_base="1.3"):
        cfg = hydra.compose("train", settings_of(Path(chosen.manifest), folder, sizes))
    cfg.ckpt_path = chosen.resume
    if chosen.repeated:
        cfg.data._target_ = f"{__name__}.{RepeatedAtlas.__name__}"
    done = train(cfg, callbacks=[clock])
    figures = {"peak_gib": peak_memory()["host_gib"]}
    if chosen.resume is None:
        figures["step_seconds"] = clock.seconds(sizes["steps"] // 3)
    if not chosen.repeated and chosen.resume is None:
        figures["loader_cells_per_second"] = loader_speed(done["datamodule"], sizes["seconds"])
    write_json(folder / "run.json", figures)


def loader_speed(module: AtlasDataModule, seconds: float) -> float:
    """Cells a second of the loader alone, after its first batch."""
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
    """A run in a process of its own; its figures, none of one that was killed."""
    command = [sys.executable, __file__, "--run", str(folder), "--manifest", str(manifest), *flags]
    done = subprocess.run([*command, *(["--quick"] if quick else [])], capture_output=True, text=True, check=False)
    if "--kill" in flags and done.returncode == -signal.SIGKILL:
        return {}
    if done.returncode != 0 or "--kill" in flags:
        raise RuntimeError(f"{' '.join(flags) or 'the unbroken run'} ended with {done.returncode}:\n{done.stderr}")
    return json.loads((folder / "run.json").read_text())


def same_weights(a: Path, b: Path) -> bool:
    """Whether two checkpoints hold the same bits of weights and of their average."""
    import torch

    first, second = (torch.load(path, map_location="cpu", weights_only=False) for path in (a, b))
    return all(
        torch.equal(value, second[part][name])
        for part in ("state_dict", "current_model_state")
        for name, value in first[part].items()
    )


def measure(folder: Path, sizes: dict[str, Any], quick: bool) -> dict[str, Any]:
    """Simulate the atlas, unless it is there, and train on it; all figures."""
    from primeflow_perturbench.simulation.atlas import simulate_atlas

    manifest = folder / "manifest.yaml"
    if not manifest.is_file():
        simulate_atlas(folder, n_files=FILES, cells=sizes["cells"], n_genes=sizes["genes"])
    last = f"checkpoints/step{sizes['steps']}.ckpt"
    with tempfile.TemporaryDirectory(dir=folder) as runs:
        unbroken, killed, repeated = (Path(runs) / name for name in ("unbroken", "killed", "repeated"))
        streamed = in_child(manifest, unbroken, quick)
        in_child(manifest, killed, quick, "--kill")
        in_child(manifest, killed, quick, "--resume", str(killed / "checkpoints/last.ckpt"))
        without_loading = in_child(manifest, repeated, quick, "--repeated")
        resumed_equal = same_weights(unbroken / last, killed / last)
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
    parser.add_argument("--folder", type=Path, help="of the simulated atlas; one that is thrown away by default")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--commit", default=commit(), help="of the source, where the machine has no checkout of git")
    parser.add_argument("--output", type=Path, default=RESULT)
    for name in ("--run", "--manifest", "--resume"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    for name in ("--kill", "--repeated"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    sizes = QUICK if chosen.quick else FULL
    if chosen.run is not None:
        train_once(chosen, sizes)
        return
    with tempfile.TemporaryDirectory() as thrown_away:
        folder = chosen.folder or Path(thrown_away)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(folder.resolve(), sizes, chosen.quick)
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
        "commit": chosen.commit,
    }
    write_json(chosen.output, record)


if __name__ == "__main__":
    main()
