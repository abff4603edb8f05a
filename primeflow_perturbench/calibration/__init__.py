"""Calibration of generated cells by a linear mixed model of condition means."""
