"""Detectors: images and names in, masks and scores out (Eq. 4 of the paper)."""
