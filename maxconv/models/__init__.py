"""Which model a checkpoint is: its tensors under the names of its family's table, dequantised."""
