"""From torch to files: one export, three lowerings, one bundle."""
