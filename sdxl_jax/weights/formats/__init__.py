"""File formats of weights, one module per layout: which bytes are which tensor."""
