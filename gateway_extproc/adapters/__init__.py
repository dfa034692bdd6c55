"""One file for each outside system. Adapters do not import each other; app.py joins them."""
