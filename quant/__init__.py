"""Rows of floats <-> blocks of bytes. Knows no model and no file."""
