"""A gated linear unit: two products and the activation between them."""
