"""maxconv: Hugging Face safetensors to MaxText (Orbax) checkpoints, converted where they train."""

__version__ = "0.1.0"
