"""A device that exists in software only, and whose tensors are not the host's."""
