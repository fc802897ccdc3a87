"""From a plan to an adapter: hyperparameters, the loop, the loss."""
