"""Files that hold weights, one module a layout: which bytes are which tensor."""
