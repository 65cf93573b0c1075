"""Where arrays go: a MaxText checkpoint in a directory, a bucket or on the Hub."""
