"""The ROCm (AMD) platform of Fairlead."""
