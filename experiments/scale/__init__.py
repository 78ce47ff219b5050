"""Memory and communication of large models, computed from shapes."""
