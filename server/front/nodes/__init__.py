"""A cluster as a front sees it: which nodes there are, links to their fronts, and whose model is whose."""
