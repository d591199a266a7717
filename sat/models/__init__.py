"""Model families: one folder each, with the model, its sharding plan and its checkpoint keys."""
