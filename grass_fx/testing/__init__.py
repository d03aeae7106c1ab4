"""What tests compare with, and what users may: Grass in plain eager code."""
