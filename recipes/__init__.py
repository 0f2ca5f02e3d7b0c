"""How a pipeline gets small: recipes and their stages (torch in, torch out)."""
