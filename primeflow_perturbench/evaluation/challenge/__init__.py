"""Virtual Cell Challenge: output steps and official scorers."""
