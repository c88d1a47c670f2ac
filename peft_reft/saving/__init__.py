"""What an adapter saves: configs that fit, the model card, checkpoints that are read safely."""
