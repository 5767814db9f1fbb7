"""Handwritten digits, and a classifier of them."""
