"""A grounded model trained from scratch on rendered scenes: autoencoder, UNet, segmenters, head."""
