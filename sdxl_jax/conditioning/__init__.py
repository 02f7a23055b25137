"""The one owner of what the UNet is told: text and geometry. Training and sampling both come here for it."""
