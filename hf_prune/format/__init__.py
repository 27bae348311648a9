"""How widths are written in a config, and how models that have them are built."""
