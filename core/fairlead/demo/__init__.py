"""The embedded model `demo`: a small Llama that writes Elizabethan plays, for trying the engine without a download."""

from pathlib import Path


def path() -> Path:
    """Return the directory that holds the model files, in the layout of a Hugging Face checkpoint."""
    return Path(__file__).resolve().parent
