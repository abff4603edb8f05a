"""Conditions: perturbations and covariates as the network reads them."""
