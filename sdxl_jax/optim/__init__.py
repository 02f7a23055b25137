"""The update of the parameters: optimisers, learning rate schedules, and the moving average (EMA)."""
