"""Complete jobs, such as converting and verifying a checkpoint, and what they share."""
