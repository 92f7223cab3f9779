"""Noise, schedules and the denoising loop."""
