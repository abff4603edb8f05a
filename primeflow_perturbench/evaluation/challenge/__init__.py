"""Virtual Cell Challenge: the output that it expects, and its official scorers."""
