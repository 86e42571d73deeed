"""What files cost: to import, to load, to convert."""
