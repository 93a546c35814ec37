"""Random programs: every method of `hessian_diag` against a dense matrix."""
