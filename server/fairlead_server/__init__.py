"""Fairlead's command line and its OpenAI-compatible HTTP server."""
