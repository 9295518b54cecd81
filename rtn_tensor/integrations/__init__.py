"""What other programs load to use this library: leaves, which nothing here imports."""
