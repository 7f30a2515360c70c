"""What every SAE is: its base class, batches, normaliser, losses, and its file."""
