"""Executes a plan: reads ahead, and computes on the devices with compiled programs."""
