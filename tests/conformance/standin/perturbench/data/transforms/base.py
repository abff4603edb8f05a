"""Transforms of batches: mappings from fields to functions."""


class Dispatch(dict):
    """Functions by field of a batch. Being a dictionary, Hydra hands it to a model as a configuration."""

    def __call__(self, batch):
        return batch._replace(**{field: function(getattr(batch, field)) for field, function in self.items()})
