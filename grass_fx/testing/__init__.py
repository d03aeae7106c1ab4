"""Plain eager code of Grass, for tests and users to compare with."""
