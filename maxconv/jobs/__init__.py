"""What a user can ask for, from beginning to end: one module each."""
