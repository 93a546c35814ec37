"""The diagonal of the Hessian: methods, what they return, and when a training loop computes it."""
