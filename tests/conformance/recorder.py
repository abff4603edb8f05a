"""A callback for commands under test: it writes which cells each batch held, and the weights after training."""

import lightning as L
import torch


class Recorder(L.Callback):
    """Writes ``{"cells": names of each batch by epoch, "weights": state_dict}`` to a file."""

    def __init__(self, path):
        self.path, self.cells = path, {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.cells.setdefault(trainer.current_epoch, []).append(batch.id)

    def on_train_end(self, trainer, pl_module):
        torch.save({"cells": list(self.cells.values()), "weights": pl_module.state_dict()}, self.path)
