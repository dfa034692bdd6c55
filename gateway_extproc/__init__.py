"""An LLM gateway: one Python process beside Envoy that turns a fleet of model servers into one URL."""

__version__ = "0.1.0"
