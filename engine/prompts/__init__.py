"""Prompts: their marks, files of them, vocabularies."""
