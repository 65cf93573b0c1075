"""Plans which bytes go to which device, in which steps, before any tensor is read."""
