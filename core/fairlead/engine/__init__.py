"""Runs the loop: schedule, build the batch, run the model, sample, update."""
