"""PerturBench's public data sets: which there are, how they are fetched, checked, unpacked and pinned."""
