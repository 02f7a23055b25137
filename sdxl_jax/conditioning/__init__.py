"""What the UNet is conditioned on, text and geometry: one implementation for training and sampling."""
