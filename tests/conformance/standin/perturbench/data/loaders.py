"""Loaders of whole batches."""

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler


class BatchedDataLoader(DataLoader):
    """Reads batches through ``__getitems__``. Only with ``ddp_mode`` do processes read different cells."""

    def __init__(self, dataset, batch_size, shuffle=True, drop_last=False, oversample=False, ddp_mode=False, **options):
        if ddp_mode:
            order = DistributedSampler(dataset, shuffle=shuffle)
        else:
            order = RandomSampler(dataset) if shuffle else SequentialSampler(dataset)
        options |= {"collate_fn": self.whole, "batch_sampler": BatchSampler(order, batch_size, drop_last)}
        super().__init__(dataset, **options)

    @staticmethod
    def whole(batch):
        return batch
