"""What is added to a model's parameters: formulas, and what of the tree they sit on. Files are in `weights`."""
