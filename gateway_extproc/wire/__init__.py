"""Bytes to core types and back, without I/O."""
