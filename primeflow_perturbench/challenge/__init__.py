"""The Virtual Cell Challenge: what is handed in, and how it is scored."""
