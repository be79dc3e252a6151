"""The CPU platform of Fairlead."""
