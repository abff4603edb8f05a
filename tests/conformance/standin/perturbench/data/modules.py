"""The data module, with plain loaders and only the attributes that PerturBench's training script reads."""

import lightning as L
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler

from primeflow_perturbench.perturbench.embedded.data import modules


class AnnDataLitModule(L.LightningDataModule):
    """Train, validation, test and prediction data of one h5ad file."""

    def __init__(self, **settings):
        super().__init__()
        self._inner = modules.AnnDataLitModule(**settings)
        self.evaluation, self.prediction = settings.get("evaluation"), settings.get("prediction")
        self.train_iterator = self.val_iterator = self.test_iterator = self.predict_iterator = None
        self.transform = self.context = None

    def setup(self, stage=None):
        inner = self._inner
        if self.context is not None:
            inner.transform, inner.context = self.transform, self.context
        inner.setup(stage)
        self.transform, self.context = inner.transform, inner.context
        for name in ("train_iterator", "val_iterator", "test_iterator", "predict_iterator"):
            setattr(self, name, getattr(inner, name))

    num_genes = property(lambda self: self._inner.num_genes)
    num_perturbations = property(lambda self: self._inner.num_perturbations)
    embedding_width = property(lambda self: self._inner.embedding_width)
    perturbation_embedding_width = property(lambda self: self._inner.perturbation_embedding_width)
    splits = property(lambda self: self._inner.splits)
    obs_df = property(lambda self: self._inner.obs_df)

    def _loader(self, dataset, size, shuffle=False):
        order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        return DataLoader(dataset, batch_size=None, sampler=BatchSampler(order, size, drop_last=False))

    def train_dataloader(self):
        return self._loader(self.train_iterator, self._inner.batch_size, shuffle=True)

    def val_dataloader(self):
        return self._loader(self.val_iterator, self._inner.batch_size)

    def test_dataloader(self):
        return self._loader(self.test_iterator, self.evaluation["chunk_size"])

    def predict_dataloader(self):
        return self._loader(self.predict_iterator, self.prediction["chunk_size"])
