"""Models and commands."""

VERSION = "0.0.0"
