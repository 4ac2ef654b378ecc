"""From what the user kept to a model that has learnt it: journal, data set, and what trains on it."""
