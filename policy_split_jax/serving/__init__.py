"""An OpenAI-compatible HTTP server for both modes of a model."""
