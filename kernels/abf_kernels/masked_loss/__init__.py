"""Linear layer and cross-entropy without all logits; `api` is the door."""
