"""The XPU (Intel) platform of Fairlead."""
