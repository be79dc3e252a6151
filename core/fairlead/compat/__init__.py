"""Other names for Fairlead's classes, for programs written for others. Nothing here is imported unless asked for."""
