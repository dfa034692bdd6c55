"""Generated from proto/ by ``python proto/generate.py``: our slice of Envoy's API. Never edited by hand."""
