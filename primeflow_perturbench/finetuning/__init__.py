"""From a trained model to other cells: weights by name, groups of parameters, and the choice of the cells."""
