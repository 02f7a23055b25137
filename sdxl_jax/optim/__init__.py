"""How parameters follow the gradient: optimisers and the moving average."""
