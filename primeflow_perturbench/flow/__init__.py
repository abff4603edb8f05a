"""Flow matching on plain tensors: path, objective, loss, coupling, guidance and solver."""
