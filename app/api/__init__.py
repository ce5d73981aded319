"""HTTP: one router a resource, its schemas under schemas/. No SQL and no torch here."""
