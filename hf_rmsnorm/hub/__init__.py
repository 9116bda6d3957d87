"""Patched models on disk and on the Hub. The only part of the package that needs transformers."""
