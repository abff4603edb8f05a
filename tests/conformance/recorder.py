"""A callback for commands under test: it writes which cells each batch held, and the weights after training."""

import lightning as L
import torch


class Recorder(L.Callback):
    """Writes ``{"cells": names of each batch by epoch, "rates": by step, "weights": state_dict}`` to a file."""

    def __init__(self, path):
        self.path, self.cells, self.rates = path, {}, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.cells.setdefault(trainer.current_epoch, []).append(batch.id)
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_end(self, trainer, pl_module):
        recorded = {"cells": list(self.cells.values()), "rates": self.rates, "weights": pl_module.state_dict()}
        torch.save(recorded, self.path)
