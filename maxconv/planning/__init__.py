"""Which bytes go to which device, and in which steps: decided before a tensor byte is read."""
