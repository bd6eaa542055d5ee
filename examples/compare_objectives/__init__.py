"""The objectives of the field on the quickstart's corpus and teacher, at equal budgets."""
