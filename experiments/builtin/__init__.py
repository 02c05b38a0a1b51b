"""Built-in data sets and the small models that are trained on them."""
