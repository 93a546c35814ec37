"""The pages of the site; `theme` has what its builder imports."""
