"""The CUDA (NVIDIA) platform of Fairlead."""
