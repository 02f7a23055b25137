"""Adapters: formulas for changes of a model's parameters, and to which parameters they apply. Files: `weights`."""
