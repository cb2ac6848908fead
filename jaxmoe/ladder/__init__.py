"""Small runs by one recipe: trained, recorded, fitted, and compared with those of a change."""
