"""What is shown of results: plots."""
